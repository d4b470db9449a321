"""What the tables say of each method: scores over orders and seeds, differences, bytes, growth, jumps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.quality.paired import Difference, difference
from subspace_peft.continual.metrics import ScoreMatrix

from .setting import ORDERS, K

RANDOM = f"random basis k={K}"
LORA, FROZEN, KEPT = "LoRA r=8 each", "frozen first basis", "Share, update kept"

Results = Mapping[str, Mapping[str, Any]]  # method → what its file of results holds


@dataclass(frozen=True)
class Row:
    """A method's results.

    Attributes:
        name: the method.
        streams: order and seed, such as ``A1`` → what was found.
        random: the same of the random basis, for methods whose forward transfer is that of the tasks themselves.
    """

    name: str
    streams: Mapping[str, Mapping[str, Any]]
    random: Mapping[str, Mapping[str, Any]]

    def matrix(self, stream: str) -> ScoreMatrix:
        """Return a stream's scores, in points, with its forward transfer where it was measured."""
        found = self.streams[stream]
        forward = {step["task"]: step["forward"]["score"] for step in found["steps"] if "forward" in step}
        baseline = dict(found.get("baseline", {}))
        if self.name == FROZEN and stream in self.random:
            # its basis is the same before and after a task: what it learns is what was there before
            forward = {name: row[-1] for name, row in zip(found["tasks"], found["R"], strict=True)}
            baseline = {name: row[-1] for name, row in zip(found["tasks"], self.random[stream]["R"], strict=True)}
        return ScoreMatrix(
            found["tasks"],
            [[points(value) for value in row] for row in found["R"]],
            {name: points(value) for name, value in forward.items()},
            {name: points(value) for name, value in baseline.items()},
        )

    def runs(self, other: Row | None = None) -> dict[str, list[int]]:
        """Return order → seeds of the streams that count: all orders of a seed, or else one order alone.

        Orders have other tasks, so that streams of two of them would count some tasks twice and others once.

        Args:
            other: count only streams that this row has, too.
        """
        known = self.streams if other is None else self.streams.keys() & other.streams.keys()
        found = {order: sorted(int(name[1:]) for name in known if name[0] == order) for order in ORDERS}
        common = sorted(set.intersection(*(set(seeds) for seeds in found.values())))
        if common:
            return dict.fromkeys(ORDERS, common)
        return dict([max(found.items(), key=lambda item: len(item[1]))] if known else [])

    def counted(self, other: Row | None = None) -> list[Mapping[str, Any]]:
        """Return the streams of `runs`."""
        return [self.streams[f"{order}{seed}"] for order, seeds in self.runs(other).items() for seed in seeds]

    def metric(self, name: str) -> Difference | None:
        """Return a metric's mean over orders and seeds with its interval, in points; None where it is undefined."""
        scores = {
            order: [self.matrix(f"{order}{seed}").metrics()[name] / 100 for seed in seeds]
            for order, seeds in self.runs().items()
        }
        if not scores or any(math.isnan(value) for each in scores.values() for value in each):
            return None
        return difference(scores, {order: [0.0] * len(each) for order, each in scores.items()})

    def last(self, other: Row | None = None) -> dict[str, list[float | None]]:
        """Return task → its scores after the last task of each stream that it arrives in; `other` as in `runs`."""
        scores: dict[str, list[float | None]] = {}
        for found in self.counted(other):
            for name, value in zip(found["tasks"], found["R"][-1], strict=True):
                scores.setdefault(name, []).append(value)
        return scores

    def total(self, stream: str) -> list[int]:
        """Return the bytes of everything stored after each task: what all tasks share, and each task's own."""
        own, totals = 0, []
        for step in self.streams[stream]["steps"]:
            own += step["own_bytes"]
            totals.append(step["shared_bytes"] + own)
        return totals

    def jumps(self) -> list[Mapping[str, float]]:
        """Return, per task of every stream that counts, what storing it changed."""
        return [step["jump"] for found in self.counted() for step in found["steps"]]

    def order_gap(self) -> float:
        """Return the mean distance, in points, of a task's last scores in the orders in which it arrives.

        NaN where none arrives in two.
        """
        runs, gaps = self.runs(), []
        for seed in next(iter(runs.values()), []):
            found: dict[str, list[float]] = {}
            for order in runs:
                stream = self.streams[f"{order}{seed}"]
                for name, score in zip(stream["tasks"], stream["R"][-1], strict=True):
                    found.setdefault(name, []).append(points(score))
            gaps += [max(each) - min(each) for each in found.values() if len(each) > 1]
        return float(np.mean(gaps)) if gaps else math.nan


def points(score: float | None) -> float:
    """Return a score in points; one that is missing as NaN."""
    return math.nan if score is None else 100 * score


def rows_of(results: Results) -> dict[str, Row]:
    """Return every method's row but the random basis's, which only forward transfer is held against."""
    random = results[RANDOM]["streams"] if RANDOM in results else {}
    return {name: Row(name, body["streams"], random) for name, body in results.items() if name != RANDOM}


def against(row: Row, other: Row, only: Sequence[str] | None = None) -> Difference | None:
    """Return a row minus another: last scores, paired by task, order and seed, over the streams that both have.

    Args:
        row, other: the two.
        only: of these tasks.
    """
    ours, theirs = row.last(other), other.last(row)
    chosen = [name for name in ours if only is None or name in only]
    if not chosen:
        return None
    return difference({name: ours[name] for name in chosen}, {name: theirs[name] for name in chosen})


def break_even(row: Row, lora: Row) -> int | None:
    """Return from how many arriving tasks on a method has stored less than one LoRA per task, in every order."""
    found = []
    for stream in row.streams:
        if stream in lora.streams:
            pairs = list(zip(row.total(stream), lora.total(stream), strict=True))
            smaller = [ours < theirs for ours, theirs in pairs]
            if not smaller[-1]:
                return None
            found.append(len(smaller) - smaller[::-1].index(False) + 1 if False in smaller else 1)
    return max(found, default=None)
