"""Compute the part of a LoRA's update outside a basis, and its best low-rank approximation, in factored form."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..basis import ModuleBasis
from ..sources import Factors


@dataclass(frozen=True, eq=False)
class Residual:
    """The residual ``R = ΔW − U C V`` of one module, as a thin SVD ``P diag(S) Tᵀ``.

    Attributes:
        P: (out, n) float64, orthonormal columns.
        S: (n,) float64, descending; Σ S² is the energy ‖ΔW‖² that the projection lost.
        T: (in, n) float64, orthonormal columns.
    """

    P: torch.Tensor
    S: torch.Tensor
    T: torch.Tensor

    def energy(self, rank: int) -> float:
        """Return ‖R‖² of its best approximation of this rank."""
        return float(self.S[:rank].square().sum())

    def lost(self, rank: int) -> float:
        """Return ‖R‖² of the rest."""
        return float(self.S[rank:].square().sum())

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``(B, A)``, (out, r) and (r, in) float64, of the best approximation of this rank."""
        return self.P[:, :rank] * self.S[:rank], self.T[:, :rank].T


def residual_of(module: ModuleBasis, update: Factors, core: torch.Tensor) -> Residual:
    """Compute the residual of an update ``B A`` that is projected to ``U core V``.

    ``R = [B, −U·core] [A; V]``: thin QR of both stacks, and an SVD of their small product, (r + k) × (r + k). Nothing
    of size out × in is formed.

    Args:
        module: The basis of the module, with orthonormal U and V.
        update: The update, of rank r.
        core: (k_out, k_in), in units of ΔW.
    """
    U, V, core = module.U.double(), module.V.double(), core.double()
    B, A = (update.B, -U @ core), (update.A, V)
    return Residual(*Factors(torch.cat(B, dim=1), torch.cat(A)).canonical())
