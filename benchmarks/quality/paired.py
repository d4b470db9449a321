"""Paired differences over tasks and seeds, with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

DRAWS = 10_000
LEVEL = 0.95
TIE = 0.5  # points: a task whose mean difference is smaller counts as a tie

Scores = Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class Difference:
    """One row's score minus another's, in points (hundredths of an accuracy or a correlation).

    Attributes:
        mean: over tasks and seeds.
        low, high: the 95 % bootstrap interval of the mean.
        wins, ties, losses: tasks whose mean difference is above, within and below half a point.
        tasks: task → mean difference.
    """

    mean: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    tasks: dict[str, float]

    @property
    def beyond_noise(self) -> bool:
        """Tell whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    @property
    def by_t(self) -> tuple[float, float] | None:
        """Return the 95 % interval of the mean by Student's t over the tasks' mean differences; None of one task.

        What seeds and random draws add is in the tasks' spread. A bootstrap over few tasks is too narrow.
        """
        each = np.array(list(self.tasks.values()))
        if len(each) < 2:
            return None
        half = float(student.ppf((1 + LEVEL) / 2, len(each) - 1) * each.std(ddof=1) / len(each) ** 0.5)
        return float(each.mean()) - half, float(each.mean()) + half

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def difference(ours: Scores, theirs: Scores, *, draws: int = DRAWS, seed: int = 0) -> Difference:
    """Return `ours` − `theirs`, paired by task and seed.

    The seed draws the training examples, their order and the head's start of both.

    The interval comes from resampling tasks, and within each drawn task its seeds, both with replacement, so it speaks
    of other tasks like these. A run that diverged (None) counts as a score of 0.

    Args:
        ours, theirs: task → a score in [0, 1] per seed, in the same order. Tasks that only one of them has are left
            out.

    Raises:
        ValueError: no task in common, or another number of seeds.
    """
    common = [task for task in ours if task in theirs]
    if not common:
        raise ValueError(f"No task in common: {sorted(ours)} and {sorted(theirs)}.")
    counts = {len(scores[task]) for scores in (ours, theirs) for task in common}
    if len(counts) != 1:
        raise ValueError(f"Another number of seeds: {sorted(counts)}. Only runs of the same seeds can be paired.")
    points = 100 * np.array(
        [[(a or 0.0) - (b or 0.0) for a, b in zip(ours[t], theirs[t], strict=True)] for t in common]
    )
    drawn = np.random.default_rng(seed)
    n, seeds = points.shape
    chosen = drawn.integers(n, size=(draws, n, 1))
    means = points[chosen, drawn.integers(seeds, size=(draws, n, seeds))].mean((1, 2))
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    per_task = dict(zip(common, points.mean(1).tolist(), strict=True))
    wins, losses = sum(d >= TIE for d in per_task.values()), sum(d <= -TIE for d in per_task.values())
    return Difference(float(points.mean()), float(low), float(high), wins, n - wins - losses, losses, per_task)


def mean_score(scores: Scores, tasks: Sequence[str]) -> float:
    """Return the mean in points over `tasks` and seeds; a run that diverged counts as 0."""
    return 100 * float(np.mean([np.mean([score or 0.0 for score in scores[task]]) for task in tasks]))
