"""Runs that are told what they give, in the place of trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import Method, RunCache, compare


def result(score: float, **more: Any) -> dict[str, Any]:
    sizes = {"trained_adapter": 1536, "trained_head": 770, "bytes": 7216}
    return {
        "validation": score,
        "test": score / 2,
        **sizes,
        "seconds": 2.0,
        "curve": [[8, score / 4], [16, score]],
        **more,
    }


class Runs:
    """A `run` that is a function of the rate, and the calls it got."""

    def __init__(self, score) -> None:
        self.score, self.calls = score, []

    def __call__(self, method: Method, rate: float | None, seed: int) -> dict[str, Any]:
        self.calls.append((method.name, rate, seed))
        return result(self.score(rate) + 0.01 * seed * (rate is not None))


def head_only(*rates: float) -> Method:
    return Method("head only", None, rates)


def run_one(method: Method, runs: Runs, folder: Path, **more: Any) -> dict[str, Any]:
    return compare([method], runs, cache=RunCache(folder, {"task": "t"}), progress=False, **more)[0]
