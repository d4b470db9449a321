"""Measure how much of a source a basis keeps that was built without it.

This is the only energy that says anything about new adapters.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..energy import share_of
from ..sources.factors import Factors, in_common_span
from .hosvd import exact, hosvd

GROUPS_UP_TO = 8  # each group left out is one more build, in as many dimensions as the fleet has ranks


def wanted(asked: bool | None, groups: Sequence[int]) -> bool:
    """Return whether to measure it: as asked, else for fleets of 2 to 8 shared-seed groups, where it costs little."""
    return asked if asked is not None else 2 <= len(set(groups)) <= GROUPS_UP_TO


def left_out_energy(
    updates: Sequence[Factors],
    weights: Sequence[float],
    groups: Sequence[int],
    size: tuple[int, int],
    alternations: int,
) -> list[float | None]:
    """Return per source the share ‖UᵀΔW Vᵀ‖² / ‖ΔW‖² that a basis of the other groups keeps of it, in one module.

    A whole shared-seed group is left out at once, since its members span each other's input side. The bases are of the
    same size, or smaller where the rest spans less.

    Args:
        updates: the sources' updates of the module.
        weights: one w per update, as for `exact`.
        groups: per source the number of its shared-seed group.
        size: k_out and k_in of the basis of all sources.
        alternations: as for that basis.

    Returns:
        One share per source; None for each where there is one group only.
    """
    shares: list[float | None] = [None] * len(updates)
    updates = in_common_span(updates)
    for group in dict.fromkeys(groups):
        rest = [i for i, other in enumerate(groups) if other != group]
        if not rest:
            break
        stack = exact([updates[i] for i in rest], [weights[i] for i in rest])
        basis = hosvd(stack, *size, alternations)
        assert basis is not None  # only a share of energy can ask for more
        U, V = basis.U.double(), basis.V.double()
        for i, other in enumerate(groups):
            if other == group:
                core = (U.T @ updates[i].B) @ (updates[i].A @ V.T)
                shares[i] = share_of(float(core.square().sum()), updates[i].norm() ** 2)
    return shares
