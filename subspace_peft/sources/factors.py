"""One source adapter's update of one module, in factored form: ``ΔW = B A``, never materialised."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Factors:
    """``ΔW = B A`` with every scale folded in.

    Attributes:
        B: (out, r) float64.
        A: (r, in) float64.
    """

    B: torch.Tensor
    A: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the update."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        return self.B.shape[1]

    def canonical(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``P (out, r), S (r,), T (in, r)`` with ``ΔW = P diag(S) Tᵀ``: the thin SVD, by QR of both factors and an SVD
        of r × r.

        The same for every gauge ``(B R⁻¹, R A)`` of one ΔW, up to the signs and ties of any SVD.
        """
        Qb, Rb = torch.linalg.qr(self.B)
        Qa, Ra = torch.linalg.qr(self.A.T)
        P, S, Th = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
        return Qb @ P, S, Qa @ Th.T

    def norm(self) -> float:
        """‖ΔW‖_F, from the r × r Gram matrices."""
        return float(((self.B.T @ self.B) * (self.A @ self.A.T)).sum().clamp_min(0).sqrt())
