"""Carry cores from one basis of a module to another, in closed form, and measure the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import BasisMismatchError
from .module import ModuleBasis

Own = tuple[torch.Tensor, torch.Tensor]  # (B, A) of an update B A


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

    def drift(self, old: torch.Tensor, new: torch.Tensor, own: Own | None = None, own_now: Own | None = None) -> float:
        """Return ``‖ΔW − ΔW'‖_F / ‖ΔW‖_F`` of an update before, ``U C V + B A``, and now, ``U' C' V' + B' A'``.

        0 where both are zero, infinite where only the old one is. Nothing of size out × in is formed.

        Args:
            old: the core C.
            new: the core C'.
            own: ``(B, A)``, (out, r) and (r, in), of the task's own directions before; None for none.
            own_now: ``(B', A')`` now; the same object where they are what they were.
        """
        # U and V are orthonormal, so the norm of U C V is that of C
        size = float(old.double().norm()) if own is None else self.size(old, own)
        if self.leading and own_now is own:
            lost = float((self.core(old) - new.double()).norm())
        else:
            pairs = [
                (self.old.U.double() @ old.double(), self.old.V),
                (-(self.new.U.double() @ new.double()), self.new.V),
            ]
            if own_now is not own:
                pairs += [] if own is None else [own]
                pairs += [] if own_now is None else [(-own_now[0], own_now[1])]
            lost = norm_of_sum(pairs)
        return lost / size if size else (0.0 if lost == 0 else float("inf"))

    def size(self, old: torch.Tensor, own: Own | None = None) -> float:
        """Return ``‖U C V + B A‖_F`` of an old core C and a task's own directions."""
        if own is None:
            return float(old.double().norm())
        return norm_of_sum([(self.old.U.double() @ old.double(), self.old.V), own])


def norm_of_sum(pairs: Sequence[Own]) -> float:
    """Return ``‖Σ B_i A_i‖_F``, without cancellation and without anything of size out × in.

    The sum is B A with ``B = [B_1 …]`` and ``A = [A_1; …]``; with thin QR of both its norm is that of R_B R_Aᵀ, which
    is small.

    Args:
        pairs: ``(B_i, A_i)``, (out, r_i) and (r_i, in), of any float dtype.
    """
    B = torch.cat([each.double() for each, _ in pairs], 1)
    A = torch.cat([each.double() for _, each in pairs])
    R = [torch.linalg.qr(side, mode="r")[1] for side in (B, A.T)]
    return float((R[0] @ R[1].T).norm())
