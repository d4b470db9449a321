"""Carry cores from one basis of a module to another, in closed form, and measure the loss."""

from __future__ import annotations

import torch

from ..errors import BasisMismatchError
from .module import ModuleBasis


class Transfer:
    """The map ``C' = (U'ᵀ U) C (V V'ᵀ)`` from old cores to new ones: the least-squares optimum in the new basis.

    It minimises ``‖U C V − U' C' V'‖_F`` for orthonormal U' and V'.

    Args:
        old: the basis of the module that cores come from.
        new: the basis of the same module that they go to.
        name: the module's name, for messages.

    Attributes:
        left: ``U'ᵀ U`` (k_out', k_out) float64.
        right: ``V V'ᵀ`` (k_in, k_in') float64.
        leading: whether the new basis begins with the very columns and rows of the old one. Then cores are padded with
            zeros, and nothing is lost.

    Raises:
        BasisMismatchError: the bases are for other shapes.
    """

    def __init__(self, old: ModuleBasis, new: ModuleBasis, name: str) -> None:
        shapes = [(each.out_features, each.in_features) for each in (old, new)]
        if shapes[0] != shapes[1]:
            raise BasisMismatchError(
                f"Module {name!r}: the old basis is for {shapes[0]}, the new one for {shapes[1]}. They belong to"
                " different base models."
            )
        self.old, self.new = old, new
        self.leading = (
            new.k_out >= old.k_out
            and new.k_in >= old.k_in
            and torch.equal(new.U[:, : old.k_out], old.U)
            and torch.equal(new.V[: old.k_in], old.V)
        )
        if self.leading:
            self.left = torch.eye(new.k_out, old.k_out, dtype=torch.float64)
            self.right = torch.eye(old.k_in, new.k_in, dtype=torch.float64)
        else:
            self.left = new.U.double().T @ old.U.double()
            self.right = old.V.double() @ new.V.double().T

    def core(self, core: torch.Tensor) -> torch.Tensor:
        """Return the new core (…, k_out', k_in') float64 of an old one (…, k_out, k_in)."""
        return self.left @ core.double() @ self.right

    def drift(self, old: torch.Tensor, new: torch.Tensor) -> float:
        """Return ``‖U C V − U' C' V'‖_F / ‖U C V‖_F`` of an old core C and a new one C'.

        0 where both are zero, infinite where only the old one is. Nothing of size out × in is formed.
        """
        # U and V are orthonormal, so the norm of U C V is that of C
        size = float(old.double().norm())
        if self.leading:
            lost = float((self.core(old) - new.double()).norm())
        else:
            # the difference is B A with B = [U C, −U' C'] (out, k_in + k_in') and A = [V; V'] (k_in + k_in', in); with
            # thin QR of both, its norm is that of R_B R_Aᵀ, which is small
            B = torch.cat([self.old.U.double() @ old.double(), -(self.new.U.double() @ new.double())], 1)
            A = torch.cat([self.old.V, self.new.V.to(self.old.V.dtype)]).double()
            R = [torch.linalg.qr(side, mode="r")[1] for side in (B, A.T)]
            lost = float((R[0] @ R[1].T).norm())
        return lost / size if size else (0.0 if lost == 0 else float("inf"))
