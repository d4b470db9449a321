"""Own directions of a weighted combination: side by side for a sum, or cut together with the core to the best rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

Pair = tuple[torch.Tensor, torch.Tensor]
LEAST = 1e-6  # of an update's norm: below it lies float32's rounding of what is combined
STEADY = 1e-4  # of an update's norm: dividing by a shorter one would cost float32's last digits


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
    B, A = (side.double() for side in update.own)
    k_out, k_in = update.core.shape
    left, R_left = torch.linalg.qr(torch.cat([U.double(), B], 1))
    right, R_right = torch.linalg.qr(torch.cat([V.double(), A]).T)
    middle = torch.block_diag(update.core.double(), torch.eye(B.shape[1], dtype=B.dtype, device=B.device))
    P, S, T = torch.linalg.svd(R_left @ middle @ R_right.T, full_matrices=False)
    best = (P[:, :rank] * S[:rank]) @ T[:rank]
    last = torch.linalg.pinv(best[k_out:, k_in:], atol=STEADY * float(S[0]), rtol=0.0)
    first = best[:k_out, :k_in] - best[:k_out, k_in:] @ last @ best[k_out:, :k_in]
    rest = best.clone()
    rest[:k_out, :k_in] -= first
    P, S_rest, T = torch.linalg.svd(rest, full_matrices=False)
    kept = int((S_rest > LEAST * float(S[0])).sum())
    core = torch.linalg.solve_triangular(R_left[:k_out, :k_out], first, upper=True)
    core = torch.linalg.solve_triangular(R_right[:k_in, :k_in], core.T, upper=True).T
    own = (left @ P[:, :kept]) * S_rest[:kept], T[:kept] @ right.T
    return Update(core, own if kept else None)
