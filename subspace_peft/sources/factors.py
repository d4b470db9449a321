"""One source adapter's update of one module in factored form, ``ΔW = B A``, which is never materialised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .._shown import Shown

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False, repr=False)
class Factors(Shown):
    """An update ``ΔW = B A`` with every scale folded in.

    Attributes:
        B: (out, r) float64.
        A: (r, in) float64.
    """

    B: torch.Tensor
    A: torch.Tensor

    def _shown_facts(self) -> Iterator[tuple[str, Any]]:
        yield "out × in", f"{self.shape[0]} × {self.shape[1]}"
        yield "rank", self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """The update's (out, in)."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """The number of columns of B; ΔW's own rank is at most that."""
        return self.B.shape[1]

    def canonical(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return ``P (out, r), S (r,), T (in, r)`` with ``ΔW = P diag(S) Tᵀ``, float64.

        This is the thin SVD, by QR of both factors and an SVD of r × r. It is the same for every gauge ``(B R⁻¹, R
        A)`` of one ΔW, up to the signs and ties of any SVD.
        """
        Qb, Rb = torch.linalg.qr(self.B)
        Qa, Ra = torch.linalg.qr(self.A.T)
        P, S, Th = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
        return Qb @ P, S, Qa @ Th.T

    def norm(self) -> float:
        """Return ‖ΔW‖_F = √(Σ BᵀB ∘ A Aᵀ), from the r × r Gram matrices."""
        return float(((self.B.T @ self.B) * (self.A @ self.A.T)).sum().clamp_min(0).sqrt())


def in_common_span(updates: Sequence[Factors]) -> list[Factors]:
    """Return the updates in orthonormal coordinates of the span of all of them.

    Norms, products and truncated SVDs are the same there, of matrices no larger than the sum of the ranks.

    Args:
        updates: of one module, in any float dtype; converted to float64.
    """
    Qb = torch.linalg.qr(torch.cat([update.B.double() for update in updates], 1))[0]
    Qa = torch.linalg.qr(torch.cat([update.A.double().T for update in updates], 1))[0]
    return [Factors(Qb.T @ update.B.double(), update.A.double() @ Qa) for update in updates]


def gram(rows: torch.Tensor) -> torch.Tensor:
    """Return ``X Xᵀ`` (…, r, r) in float64.

    Of half-precision rows it is computed in float32, where that does not overflow: its rounding lies far below that of
    the rows, and float64 would take twice as long.

    Args:
        rows: X (…, r, d) in any float dtype.
    """
    if rows.dtype in HALF:
        wide = rows.float()
        found = (wide @ wide.mT).double()
        if torch.isfinite(found).all():
            return found
    wide = rows.double()
    return wide @ wide.mT
