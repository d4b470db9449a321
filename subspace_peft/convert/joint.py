"""Fit a core and own directions to a LoRA's update together: the best pair, in factored form."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..basis import ModuleBasis
from ..basis.blocks import Blocks, blocks_of
from ..sources import Factors

ROUNDS = 20  # of the alternation, at most
GAIN = 1e-4  # of ‖ΔW‖²: a round that gains less is the last
ROUNDED = 1e-14  # of ‖ΔW‖²: starts that differ by less are alike, since factors are stored in float32
GROWTH = 10.0  # of ‖ΔW‖: a larger core would cancel against the own part, at the cost of a stored dtype's digits


@dataclass(frozen=True, eq=False)
class JointFit:
    """A core and own directions that approximate ``ΔW ≈ U C V + B A``.

    Attributes:
        core: C (k_out, k_in) float64, in units of ΔW. It is not the projection ``Uᵀ ΔW Vᵀ`` but ``Uᵀ (ΔW − B A) Vᵀ``.
        own: ``(B, A)``, (out, φ) and (φ, in) float64.
        lost: ‖ΔW − U C V − B A‖², after each round, never more than before; the last is of `core` and `own`.
    """

    core: torch.Tensor
    own: tuple[torch.Tensor, torch.Tensor]
    lost: list[float]


def joint_fit(module: ModuleBasis, update: Factors, rank: int) -> JointFit:
    """Minimise ‖ΔW − U C V − B A‖_F over C, B and A together, with rank(B A) ≤ φ.

    Each round takes the best of one for the other: ``B A = SVD_φ(ΔW − U C V)``, then ``C = Uᵀ (ΔW − B A) Vᵀ``. It
    begins at the best of the projection ``Uᵀ ΔW Vᵀ``, the Schur complement of the part outside the basis, and C = 0,
    and ends when a round gains less than 1e-4 of ‖ΔW‖², or after 20: a local optimum. With φ ≥ rank(ΔW), and wherever
    so many directions can, it begins at ΔW itself. Of starts that lose alike it is the first: where the projection
    leaves no more than φ directions, it is the core. All of it is algebra of matrices of size (k + r)²; one thin QR
    per side makes them.

    Args:
        module: The basis of the module, with orthonormal U and V.
        update: ΔW = B A, of rank r.
        rank: φ, at least 1. Directions for which nothing is left are zeros.
    """
    blocks = blocks_of(module.U, module.V, update.B, update.A)
    small, total = blocks.small, float(blocks.small.square().sum())
    core_of = slice(blocks.k_out), slice(blocks.k_in)
    projected = small.clone()
    projected[core_of] = 0
    # what is left of ΔW beside a core; the first is always within the bound
    starts = [projected, blocks.completed(small, rank), small.clone()]
    starts = [rest for rest in starts if _bounded(blocks, rest)]
    cuts = [_cut(rest, rank) for rest in starts]
    least = min(loss for _, _, loss in cuts)
    rest, best, loss = next(found for found in cuts if found[2] <= least + ROUNDED * total)
    lost = [loss]
    while len(lost) <= ROUNDS:
        better = small.clone()
        better[core_of] = best[core_of]
        if not _bounded(blocks, better):
            break
        found = _cut(better, rank)
        if found[2] > lost[-1]:
            break  # by rounding
        rest, best, loss = found
        lost.append(loss)
        if lost[-2] - loss < GAIN * total:
            break
    B, A = blocks.own(rest, rank)
    fill = rank - B.shape[1]
    B, A = torch.nn.functional.pad(B, (0, fill)), torch.nn.functional.pad(A, (0, 0, 0, fill))
    # the core comes last, so that the projection of the sum on the basis is that of ΔW
    last = small - best
    last[core_of] = 0
    beside = small.clone()
    beside[core_of] = best[core_of]
    if _bounded(blocks, beside):
        rest = beside
        lost[-1] = min(lost[-1], float(last.square().sum()))
    return JointFit(blocks.core((small - rest)[core_of]), (B, A), lost)


def _bounded(blocks: Blocks, rest: torch.Tensor) -> bool:
    return float((blocks.small - rest).norm()) <= GROWTH * float(blocks.small.norm())


def _cut(rest: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return a matrix, its best approximation of that rank, and what this loses."""
    P, S, T = torch.linalg.svd(rest, full_matrices=False)
    return rest, (P[:, :rank] * S[:rank]) @ T[:rank], float(S[rank:].square().sum())
