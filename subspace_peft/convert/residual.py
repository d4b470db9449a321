"""Compute the part of a LoRA's update outside a basis, and its best low-rank approximation, in factored form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .._io.warn import warn_caller
from ..basis import ModuleBasis
from ..basis.spread import spread_by_energy
from ..errors import SubspaceError
from ..sources import Factors
from .projection import Projection

ROUNDING = 1e-12  # of ‖ΔW‖²: what stored bases, orthonormal to float32's precision, leave of an update that they keep


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


def residual_in(projection: Projection, name: str) -> Residual:
    """Compute the residual of one module of a projected LoRA, by the module's name in the LoRA."""
    place = projection.places[name]
    return residual_of(projection.basis[place], projection.source.factors(name), projection.cores[place])


def directions_of(
    projection: Projection, rank: int | None, budget: int | None
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Choose a task's own directions for what the basis does not keep of a LoRA.

    Args:
        projection: The projected LoRA.
        rank: Directions per module; with a budget the most that a module gets, None for any number.
        budget: How many parameters all directions together may have; None for no limit.

    Returns:
        Module of the basis → ``(B, A)``, (out, φ) and (φ, in) float64: the best approximation of the residual by φ
        directions, filled up with zeros where the residual's rank is lower. Modules without a direction are left out.

    Raises:
        SubspaceError: The budget is less than one direction takes.
    """
    places, shapes = projection.places, projection.basis.shapes()
    sizes = {name: (shapes[place]["out"], shapes[place]["in"]) for name, place in places.items()}
    fit = max(min(size) for size in sizes.values())
    if (rank or 0) > fit:
        warn_caller(
            f"project_lora: extra_rank={rank} (--extra-rank {rank}) is more directions than any module has; they get"
            f" {fit} at most."
        )
    if budget is None:
        ranks = {name: min(rank or 0, *size) for name, size in sizes.items()}
    else:
        # the factors of all modules would be as many as a model's weights: only spectra are kept until it is known
        # which are needed
        spectra = {name: residual_in(projection, name).S for name in places}
        least = ROUNDING * sum(projection.source.norm(name) ** 2 for name in places)
        ranks = spread({name: S[:rank] for name, S in spectra.items()}, sizes, budget, least)
    own = {}
    for name in filter(ranks.__getitem__, places):
        B, A = residual_in(projection, name).factors(ranks[name])
        fill = ranks[name] - B.shape[1]
        pad = torch.nn.functional.pad
        own[places[name]] = pad(B, (0, fill)), pad(A, (0, 0, 0, fill))
    return own


def spread(
    spectra: Mapping[str, torch.Tensor], sizes: Mapping[str, tuple[int, int]], budget: int, least: float = 0.0
) -> dict[str, int]:
    """Give own directions to those modules where a parameter keeps most energy.

    Args:
        spectra: Module → the singular values of its residual, descending.
        sizes: Module → (out, in): a direction takes out + in parameters.
        budget: Parameters in all.
        least: Energies σ² up to this are rounding, for which nothing is spent.

    Returns:
        Module → directions, Σ (out + in) · directions ≤ `budget`.

    Raises:
        SubspaceError: One direction takes more than the budget, in every module.
    """
    costs = {name: sum(size) for name, size in sizes.items()}
    if budget < (cheapest := min(costs.values())):
        raise SubspaceError(
            f"extra_budget={budget} (--extra-budget {budget}): one direction takes {cheapest:,} parameters at least,"
            f" as many as a module's out + in. Give {cheapest} or more; {sum(costs.values())} are one in every module."
        )
    energies = {name: S.square().tolist() for name, S in spectra.items()}
    return spread_by_energy(energies, costs, budget=budget, least=least)
