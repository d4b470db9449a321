"""How far a difference of two scores may be off by the choice of the examples: the jackknife over folds of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

FOLDS = 40


def kept_without(count: int, folds: int = FOLDS) -> list[np.ndarray]:
    """Return, per fold of `count` examples, the places of all others, (count − fold,) of int64.

    The folds are equally large but for one example, the same at every call; there are at most as many as examples.
    """
    order = np.random.default_rng(0).permutation(count)
    parts = np.array_split(order, min(folds, count))
    return [np.setdiff1d(order, part) for part in parts]


def standard_error(left: Sequence[float | None], right: Sequence[float | None]) -> float:
    """Return the standard error of a difference of two scores on the same examples.

    For a score that is a mean over examples, with as many folds as examples, this is the textbook's paired one. It
    holds as well for scores that are none, such as a correlation.

    Args:
        left, right: the two scores without each fold in turn, see `kept_without`.

    Returns:
        The error; infinite where a score is None or not finite, or there are fewer than two folds: then no difference
        is beyond noise.
    """
    pairs = list(zip(left, right, strict=True))
    if len(pairs) < 2 or any(value is None or not math.isfinite(value) for pair in pairs for value in pair):
        return math.inf
    differences = np.array(pairs, dtype=np.float64) @ (1.0, -1.0)
    spread = differences - differences.mean()
    return float(np.sqrt((len(pairs) - 1) / len(pairs) * np.square(spread).sum()))
