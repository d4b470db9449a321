"""Own directions of the rows of a batch: each row's gathered as its core is, one batched product for each side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class OwnRows(NamedTuple):
    """Each row's own directions in one layer; zeros for rows of tasks that have none, or fewer.

    Attributes:
        A: (n, φ, in).
        B: (n, φ, out), transposed, scale folded in.
    """

    A: torch.Tensor
    B: torch.Tensor

    def of(self, rows: torch.Tensor) -> OwnRows:
        """Return those of the rows at these places."""
        return OwnRows(self.A[rows], self.B[rows])

    def to(self, *how: torch.device | torch.dtype) -> OwnRows:
        """Return them on another device, or in another dtype."""
        return OwnRows(self.A.to(*how), self.B.to(*how))


def stacked(parts: Sequence[tuple[torch.Tensor, torch.Tensor] | None]) -> OwnRows | None:
    """Stack tasks' own directions, as `SubspaceLayer.own_part` gives them, padded with zeros to the most that one has.

    Args:
        parts: per task ``(B, A)``, (out, φ) and (φ, in), or None for none.

    Returns:
        A row per task; None where no task has any.
    """
    present = [part for part in parts if part is not None]
    if not present:
        return None
    rank = max(A.shape[0] for _, A in present)
    B, A = present[0]
    made = OwnRows(A.new_zeros(len(parts), rank, A.shape[1]), B.new_zeros(len(parts), rank, B.shape[0]))
    for row, part in enumerate(parts):
        if part is not None:
            made.A[row, : part[1].shape[0]] = part[1]
            made.B[row, : part[0].shape[1]] = part[0].T
    return made


def product(rows: torch.Tensor, sides: torch.Tensor) -> torch.Tensor:
    """Multiply each row (n, …, a) by its own side (n, a, b), in the sides' dtype: (n, …, b)."""
    flat = rows.reshape(len(rows), -1, rows.shape[-1]).to(sides.dtype)
    return torch.bmm(flat, sides).reshape(*rows.shape[:-1], sides.shape[-1])
