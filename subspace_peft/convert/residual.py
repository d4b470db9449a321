"""Compute what a projection leaves of a LoRA's update, in factored form, and where own directions are worth most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .._io.warn import warn_caller
from ..basis import ModuleBasis
from ..basis.spread import spread_by_energy
from ..errors import SubspaceError
from ..sources import Factors
from .joint import JointFit, joint_fit
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


def directions_of(projection: Projection, rank: int | None, budget: int | None) -> dict[str, JointFit]:
    """Fit cores and own directions to a LoRA together.

    How a budget is spread over the modules goes by the singular values of what the projection leaves: an estimate, as
    the pair that is fitted then (`joint_fit`) holds more with as many. No module gets more than the LoRA's rank by it.

    Args:
        projection: The projected LoRA.
        rank: Directions per module; with a budget the most that a module gets, None for any number.
        budget: How many parameters all directions together may have; None for no limit.

    Returns:
        Module of the basis → the fit. Modules without a direction are left out: their core is the projection.

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
        # with as many as the LoRA's rank nothing is lost
        most = {name: min(projection.source.factors(name).rank, rank or len(S)) for name, S in spectra.items()}
        least = ROUNDING * sum(projection.source.norm(name) ** 2 for name in places)
        ranks = spread({name: S[: most[name]] for name, S in spectra.items()}, sizes, budget, least)
    return fits_of(projection, ranks)


def fits_of(projection: Projection, ranks: Mapping[str, int]) -> dict[str, JointFit]:
    """Fit cores and own directions together.

    Args:
        projection: The projected LoRA.
        ranks: Module of the LoRA → own directions, 0 for none.

    Returns:
        Module of the basis → the fit, of the modules that have directions.
    """
    basis, factors, places = projection.basis, projection.source.factors, projection.places
    return {places[name]: joint_fit(basis[places[name]], factors(name), rank) for name, rank in ranks.items() if rank}


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
