"""Comparisons of rows on one held-out task, every run kept."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common as shared
import torch
from common import Method, RunCache
from common.sweep import WIDENINGS
from peft import get_peft_model

from subspace_peft import SubspaceBasis, build_basis

from . import tasks
from .encoder import ADAPTED, Head, half_is_faster
from .fleet import others, require_left_out, source
from .gradients import Gradients, first_gradients
from .heads import begin, head_state
from .training import HEAD, Budget, make_model, pooled, score, train

SEEDS = (1, 2, 3)
K = 16


class OutOfTime(Exception):
    """The time that was given is over; what is done is kept."""


@dataclass
class Bench:
    """Where things are kept, and what may be spent.

    Attributes:
        folder: cache of hidden states, source adapters and runs.
        until: `time.time()` at which no further run begins.
        seeds: report seeds.
        source_budget: of the fleet's training.
        fleet: its tasks; all of the held-out task's kind without it.
        results: where finished experiments' results are.
        widenings: how often a sweep may be widened.
    """

    folder: Path
    until: float = float("inf")
    seeds: Sequence[int] = SEEDS
    source_budget: Budget | None = None
    fleet: Sequence[str] | None = None
    results: Path | None = None
    widenings: int = WIDENINGS

    def __post_init__(self) -> None:
        self._tasks: dict[str, tasks.EncodedTask] = {}
        self._pooled: dict[str, tasks.EncodedTask] = {}
        self._bases: dict[Any, SubspaceBasis] = {}
        self._gradients: dict[str, Gradients] = {}

    def task(self, name: str) -> tasks.EncodedTask:
        if name not in self._tasks:
            # one at a time: a task takes a hundred megabytes
            self._tasks = {name: tasks.load(name, self.folder)}
        return self._tasks[name]

    def pooled(self, name: str) -> tasks.EncodedTask:
        if name not in self._pooled:
            self._pooled = {name: pooled(self.top(name), self.task(name))}
        return self._pooled[name]

    def first_gradients(self, name: str) -> Gradients:
        """Return the first gradients of all training examples of a task."""
        if name not in self._gradients:
            task = self.task(name)
            self._gradients[name] = first_gradients(make_model(self.top(name), task.outputs, 0), task.splits["train"])
        return self._gradients[name]

    def top(self, name: str) -> dict[str, Any]:
        return tasks.top_layers(tasks.kind_of(name), self.folder)

    def members(self, kind: str) -> Sequence[str]:
        """Return the tasks whose adapters are the fleet of a kind of task."""
        return self.fleet or tasks.names(kind)

    def source(self, name: str, start: int | str | None = None) -> Path:
        given = {} if self.source_budget is None else {"budget": self.source_budget}
        return source(name, self.folder, start=start, **given)

    def basis(
        self, held_out: str, *, fleet: Sequence[str] | None = None, start: int | str | None = None, **build: Any
    ) -> SubspaceBasis:
        """Return the basis of all other tasks' adapters, of the held-out task's kind unless `fleet` says otherwise.

        Raises `SubspaceError` where the held-out task's own adapter got into it.
        """
        members = others(held_out, fleet or self.members(tasks.kind_of(held_out)))
        key = (held_out, tuple(members), start, json.dumps(build, sort_keys=True))
        if key not in self._bases:
            folders = [str(self.source(name, start)) for name in members]
            built = build_basis(folders, **{"k": K, "leave_one_out": False, "progress": False, **build})
            self._bases[key] = require_left_out(built, self.source(held_out, start))
        return self._bases[key]

    def control(self, builder: str, held_out: str, k: int = K, seed: int = 0) -> SubspaceBasis:
        """Build a `random` or `base-weights` basis of size k."""
        model = make_model(self.top(held_out), 2, 0)
        return build_basis(
            builder=builder, base_model=model, target_modules=list(ADAPTED), k=k, seed=seed, progress=False
        )

    def compare(
        self,
        name: str,
        methods: Sequence[Method],
        budget: Budget,
        *,
        seeds: Sequence[int] | None = None,
        sweep_seeds: Sequence[int] | None = None,
        head_rates: Sequence[float] = (),
        tested: bool = True,
    ) -> list[dict[str, Any]]:
        """Return the rows of `compare` for one held-out task.

        Args:
            name: of the task.
            methods: the rows.
            budget: of every run.
            seeds: those reported, in the place of the bench's.
            sweep_seeds: as of `compare`; seed 0 alone without them.
            head_rates: learning rates of the head beside an adapter, tried jointly with the adapter's, in the place of
                the budget's one.
            tested: whether the test split is looked at, for report seeds.

        Raises:
            OutOfTime: the time is over.
        """
        if head_rates:
            each = [
                self.compare(
                    name,
                    methods,
                    replace(budget, head_rate=rate),
                    seeds=seeds,
                    sweep_seeds=sweep_seeds,
                    tested=tested,
                )
                for rate in head_rates
            ]
            return [best_head(list(zip(head_rates, rows, strict=True))) for rows in zip(*each, strict=True)]
        report = self.seeds if seeds is None else seeds
        task = self.task(name)
        settings = {
            "task": name,
            "data": task.digest,
            "top": tasks.TOP,
            "tokens": tasks.TOKENS,
            "half": half_is_faster(),
            **budget.settings(),
        }

        def run(method: Method, rate: float | None, seed: int) -> Mapping[str, Any]:
            if time.time() > self.until:
                raise OutOfTime
            assert rate is not None
            data, config = task, method.for_seed(seed)
            start = head_state(lambda: self.pooled(name), budget, seed)
            # behind what is made at most once, so that a run has the same numbers whichever comes first
            torch.manual_seed(seed)
            if config is None:
                data = self.pooled(name)
                wrapped = begin(Head(data.splits["train"].hidden.shape[-1], task.outputs, seed), start)
            else:
                wrapped = get_peft_model(begin(make_model(self.top(name), task.outputs, seed), start), config)
            reported = seed in report
            result = train(wrapped, data, budget, rate, seed, curve=reported and tested)
            adapter, head = (sum(p.numel() for p in part) for part in shared.trained_parameters(wrapped, HEAD))
            return {
                **result,
                "test": score(wrapped, data, "test") if reported and tested else None,
                # what is to be tested later has no metrics; what is not to be tested has none to wait for
                "metrics": None if tested else {},
                "trained_adapter": adapter,
                "trained_head": head,
                "bytes": 4 * adapter,
            }

        cache = RunCache(self.folder / "cells" / name, settings)
        # where there is no rate to choose, a run with the sweep's seed would tell nothing
        swept = any(len(method.rates) > 1 for method in methods)
        chosen = {"sweep_seeds": sweep_seeds} if swept else {"sweep_seed": report[0]}
        return shared.compare(
            methods, run, seeds=report, cache=cache, progress=False, widenings=self.widenings, **chosen
        )


def best_head(rows: Sequence[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    """Return that of one method's `rows` whose sweep has the best validation score, with its ``head_rate``.

    Of equals the first.

    Args:
        rows: pairs of a head's rate and what `compare` returns for it.
    """

    def best(row: Mapping[str, Any]) -> float:
        return max((each["validation"] for each in row["sweep"] if each["validation"] is not None), default=-math.inf)

    rate, row = max(rows, key=lambda pair: best(pair[1]))
    return {**row, "head_rate": rate}
