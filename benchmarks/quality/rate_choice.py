"""How well validation chose learning rates: what its choice cost, and whether two seeds agree."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .sections import Rows

FAR = 4.0  # a factor between the best rates of two seeds beyond which they disagree: more than a neighbour
COSTLY = 3.0  # points of test score
Tried = Sequence[tuple[float, Sequence[float | None], Sequence[float | None]]]


def mean(scores: Sequence[float | None]) -> float:
    """Return the mean score; a run that diverged counts as 0."""
    return sum(score or 0.0 for score in scores) / len(scores)


def lost(row: Mapping[str, Any]) -> float | None:
    """Return by how many points of test score the chosen rate is behind the best tried one; None where it is unknown.

    Over the seeds of the sweep. The best one is found by the test scores themselves, which a user does not have: this
    is the most that a better choice could have gained, and above 0 by chance alone.
    """
    tried: Tried = row.get("tried") or []
    pairs = [pair for _, found, tests in tried for pair in zip(found, tests, strict=True)]
    if not tried or any(test is None and value is not None for value, test in pairs):
        return None
    means = {rate: mean(tests) for rate, _, tests in tried}
    return 100 * (max(means.values()) - means[row["rate"]])


def alone(row: Mapping[str, Any]) -> list[float]:
    """Return the rate that each seed of the sweep would have chosen alone; nothing where one seed swept."""
    tried: Tried = sorted(row.get("tried") or [], key=lambda each: each[0])

    def chosen(seed: int) -> float:
        return max(tried, key=lambda each: -math.inf if each[1][seed] is None else each[1][seed])[0]

    return [chosen(seed) for seed in range(len(tried[0][1]) if tried else 0)]


def disagreement(row: Mapping[str, Any]) -> float:
    """Return the factor between the largest and the smallest of the rates that each seed alone would have chosen."""
    rates = alone(row) or [1.0]
    return max(rates) / min(rates)


def single_seed_cost(row: Mapping[str, Any]) -> float:
    """Return by how many points of mean validation a rate chosen by one seed is behind the chosen one, on average."""
    means = {rate: mean(found) for rate, found, _ in row.get("tried") or []}
    return 100 * statistics.fmean([max(means.values()) - means[rate] for rate in alone(row)] or [0.0])


def choice_of_rates(rows: Rows, order: Sequence[str]) -> list[str]:
    """Return a line per row that was swept: its rates, where the seeds disagree, where the choice cost test score."""
    heads = (
        "row",
        "median rate",
        "smallest",
        "largest",
        "at an edge",
        "tasks whose two seeds choose rates far apart",
        "validation that one seed's choice costs",
        f"tasks where the choice costs more than {COSTLY:g} points of test",
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in order:
        each = {task: row for task, row in rows.get(name, {}).items() if len(row["sweep"]) > 1}
        if not each:
            continue
        rates = sorted(row["rate"] for row in each.values())
        losses = {task: value for task, row in each.items() if (value := lost(row)) is not None}
        costly = [f"{task} {-value:.1f}" for task, value in losses.items() if value > COSTLY]
        far = [task for task, row in each.items() if disagreement(row) > FAR * 1.001]
        cost = statistics.fmean(single_seed_cost(row) for row in each.values())
        edges = sum(row["at_edge"] for row in each.values())
        lines.append(
            f"| {name} | {statistics.median_low(rates):g} | {rates[0]:g} | {rates[-1]:g} | {edges} of {len(each)}"
            f" | {', '.join(far) or '–'} | {cost:.1f} | {', '.join(costly) or '–'} |"
        )
    return lines
