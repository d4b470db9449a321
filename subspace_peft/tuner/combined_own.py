"""Own directions of a weighted combination: side by side for a sum, or cut together with the core to the best rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..basis.blocks import blocks_of

Pair = tuple[torch.Tensor, torch.Tensor]
LEAST = 1e-6  # of an update's norm: below it lies float32's rounding of what is combined


class Update(NamedTuple):
    """One layer's update ``ΔW = U core V + B A``.

    Attributes:
        core: (k_out, k_in).
        own: ``(B, A)``, (out, φ) and (φ, in), or None.
    """

    core: torch.Tensor
    own: Pair | None

    @property
    def extra_rank(self) -> int:
        """How many own directions it has, no more than its sizes allow."""
        return 0 if self.own is None else min(*self.own[0].shape, *self.own[1].shape[1:])


def side_by_side(parts: Sequence[Pair | None], weights: torch.Tensor) -> Pair | None:
    """Return ``(B, A)`` with ``B A = Σ w_i B_i A_i``; None where none has own directions.

    Args:
        parts: per task ``(B_i, A_i)``, (out, φ_i) and (φ_i, in), or None.
        weights: w.
    """
    present = [(part, weight) for part, weight in zip(parts, weights, strict=True) if part is not None]
    if not present:
        return None
    return torch.cat([B * weight for (B, _), weight in present], 1), torch.cat([A for (_, A), _ in present])


def cut(update: Update, U: torch.Tensor, V: torch.Tensor, rank: int) -> Update:
    """Return the best approximation of rank `rank` of an update, as a core of at most that rank and own directions.

    In bases of ``[U, B]`` and ``[V; A]`` an update is a small matrix of four blocks, and a core may be anything in the
    first: what the other three ask for is one direction for each rank of the last (Schur complement), or two where the
    last lacks it.

    Args:
        update: with own directions.
        U: (out, k_out).
        V: (k_in, in).
        rank: at least 1.
    """
    assert update.own is not None
    blocks = blocks_of(U, V, *update.own, core=update.core)
    k_out, k_in = update.core.shape
    P, S, T = torch.linalg.svd(blocks.small, full_matrices=False)
    best = (P[:, :rank] * S[:rank]) @ T[:rank]
    rest = blocks.completed(best)
    core = blocks.core((best - rest)[:k_out, :k_in])
    kept = int((torch.linalg.svdvals(rest) > LEAST * float(S[0])).sum())
    return Update(core, blocks.own(rest, kept) if kept else None)
