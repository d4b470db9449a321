"""Spread parameters over modules: direction by direction, each to where a parameter holds most energy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def spread_by_energy(
    energies: Mapping[str, Iterable[float]],
    costs: Mapping[str, int],
    *,
    budget: int | None = None,
    wanted: float | None = None,
    least: float = 0.0,
) -> dict[str, int]:
    """Return how many directions every module gets.

    The spread is greedy: the next direction is the one of the largest energy per parameter, the first of equals. One
    that cannot be paid for any more makes room for the next that can.

    Args:
        energies: Module → the energies σ² that its directions hold, descending.
        costs: Module → the parameters of a direction, out + in.
        budget: Parameters in all; None for any number.
        wanted: The energy that is enough; None for all.
        least: Energies up to this count as none.

    Returns:
        Module → directions, with Σ costs · directions ≤ `budget`.
    """
    order = {name: number for number, name in enumerate(energies)}
    steps = sorted(
        (-energy / costs[name], order[name], number, name, energy)
        for name, each in energies.items()
        for number, energy in enumerate(each)
        if energy > least
    )
    counts, spent, held = dict.fromkeys(energies, 0), 0, 0.0
    for _, _, number, name, energy in steps:
        if wanted is not None and held >= wanted:
            break
        # of a module's directions, equal ones aside, none comes before the one in front of it
        if counts[name] != number or (budget is not None and spent + costs[name] > budget):
            continue
        counts[name], spent, held = number + 1, spent + costs[name], held + energy
    return counts
