"""Absorb tasks' own directions: the fewest that a basis lacks for them, so that each is exact as a core on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..basis import ModuleBasis, SubspaceBasis
from ..basis.lineage import earlier_versions
from ..basis.module import fix_signs
from ..basis.transfer import Own, Transfer
from ..sources.factors import Factors
from ..sources.source import Source
from .extend import frame, orthogonal_to

if TYPE_CHECKING:
    from ..tasks.read import SavedTask

# this share of an own part's norm may stay outside, per side: both it and the basis are stored in float32, which
# leaves 1e-7 of what lies inside
NULL_OWN = 2e-7


@dataclass(frozen=True)
class Absorbed:
    """What absorbing did to a module.

    Attributes:
        module: the basis with the further directions; the very object where none are needed. M, G and cores are the
            old ones' and not yet of its size.
        needed: how many directions the own parts need in all, output and input side.
    """

    module: ModuleBasis
    needed: tuple[int, int]


def absorb(module: ModuleBasis, parts: Sequence[Own], bound: tuple[int, int] | None = None) -> Absorbed:
    """Extend a module by what several own parts ``B_i A_i`` need beside it, and no more.

    Per side these are the left singular vectors of ``(I − U Uᵀ) P_i S_i``, ``B_i A_i = P_i S_i T_iᵀ`` being the thin
    SVD, and of ``(I − Vᵀ V) T_i S_i``: of each part what the directions before it leave, so that parts share
    directions. The trailing ones that together hold no more than `NULL_OWN` of the part's norm are rounding and left
    out. The others come in the order of the energy that the parts, each as of norm 1, have in them.

    Args:
        module: the basis, whose U and V stay bit for bit.
        parts: ``(B, A)``, (out, r) and (r, in), of each task.
        bound: at most so many directions, on the output and the input side; None for as many as are needed.
    """
    split = [Factors(B.double(), A.double()).canonical() for B, A in parts]
    split = [each for each in split if float(each[1].norm()) > 0]
    stacks = [P * S for P, S, _ in split], [T * S for _, S, T in split]
    sides = []
    for fixed, columns in zip(frame(module), stacks, strict=True):
        Q = fixed[:, :0]
        for each in columns:
            more = _left(each, torch.cat([fixed, Q], 1))
            Q = torch.cat([Q, more], 1)
        if Q.shape[1]:
            stack = torch.cat([each / each.norm() for each in columns], 1)
            Q = Q @ torch.linalg.svd(Q.T @ stack, full_matrices=True)[0]
        sides.append(Q)
    needed = sides[0].shape[1], sides[1].shape[1]
    if not any(needed):
        return Absorbed(module, needed)
    kept = [Q if bound is None else Q[:, :most] for Q, most in zip(sides, bound or needed, strict=True)]
    U, V = (
        torch.cat([old, fix_signs(Q).to(old.dtype)], 1) for old, Q in zip((module.U, module.V.T), kept, strict=True)
    )
    return Absorbed(ModuleBasis(U=U.contiguous(), V=V.T.contiguous()), needed)


def _left(columns: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
    """Return an orthonormal basis (d, n) float64 of what orthonormal directions leave of columns, without rounding."""
    rest = columns
    for _ in range(2):
        rest = rest - fixed @ (fixed.T @ rest)
    P, S, _ = torch.linalg.svd(rest, full_matrices=False)
    # trailing[i]: the norm of all from i on
    trailing = S.square().flip(0).cumsum(0).flip(0).sqrt()
    alive = min(int((trailing > NULL_OWN * float(columns.norm())).sum()), len(fixed) - fixed.shape[1])
    return orthogonal_to(P[:, :alive], fixed) if alive else P[:, :0]


def own_parts(source: Source, basis: SubspaceBasis) -> dict[str, Own] | None:
    """Return the own directions of a source that is a task on a basis: module, as the source calls it → ``(B, A)``.

    A task on an earlier version counts, where the basis begins with all that it uses.

    Returns:
        None where the source is no such task, but an adapter that has to be approximated.
    """
    task = source.task
    if task is None or not is_on(task, basis):
        return None
    return {module: task.own[own] for module in source.keys if (own := source.aliases.get(module, module)) in task.own}


def is_on(task: SavedTask, basis: SubspaceBasis) -> bool:
    """Return whether a task is on a basis, or on an earlier version whose directions the basis begins with."""
    fingerprint = task.config.basis_fingerprint
    if fingerprint == basis.fingerprint:
        return True
    if fingerprint is None or fingerprint not in earlier_versions(basis):
        return False
    named = basis.named(task.config.basis_names or {})
    places = {module: named.find(module) for module in task.cores}
    return all(
        key is not None and Transfer(task.modules[module], basis[key], module).leading
        for module, key in places.items()
    )
