"""Experiments: held-out task by task, rows from `rows.py`, every run kept, results written as they come."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common as shared
import torch
from common import Method, RunCache
from common.run_cache import plain
from peft import get_peft_model

from subspace_peft import SubspaceBasis, build_basis
from subspace_peft._io.atomic import write_text_aside
from subspace_peft.errors import SubspaceError

from . import tasks
from .encoder import ADAPTED, Head, half_is_faster
from .fleet import others, require_left_out, source
from .gradients import Gradients, first_gradients
from .rows import PerSeed
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
    """

    folder: Path
    until: float = float("inf")
    seeds: Sequence[int] = SEEDS
    source_budget: Budget | None = None
    fleet: Sequence[str] | None = None
    results: Path | None = None

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

    def compare(self, name: str, methods: Sequence[Method], budget: Budget) -> list[dict[str, Any]]:
        """Return the rows of `compare` for one held-out task. Raises `OutOfTime`."""
        task = self.task(name)
        settings = {
            "task": name,
            "data": task.digest,
            "top": tasks.TOP,
            "tokens": tasks.TOKENS,
            "half": half_is_faster(),
            **asdict(budget),
        }

        def run(method: Method, rate: float | None, seed: int) -> Mapping[str, Any]:
            if time.time() > self.until:
                raise OutOfTime
            assert rate is not None
            torch.manual_seed(seed)
            data, wrapped = task, None
            if method.adapter is None:
                data = self.pooled(name)
                wrapped = Head(data.splits["train"].hidden.shape[-1], task.outputs, seed)
            else:
                per_seed = method.for_seed if isinstance(method, PerSeed) else None
                config = per_seed(seed) if per_seed else method.adapter()
                wrapped = get_peft_model(make_model(self.top(name), task.outputs, seed), config)
            reported = seed != 0
            result = train(wrapped, data, budget, rate, seed, curve=reported)
            adapter, head = (sum(p.numel() for p in part) for part in shared.trained_parameters(wrapped, HEAD))
            return {
                **result,
                "test": score(wrapped, data, "test") if reported else None,
                "metrics": None,
                "trained_adapter": adapter,
                "trained_head": head,
                "bytes": 4 * adapter,
            }

        cache = RunCache(self.folder / "cells" / name, settings)
        # where there is no rate to choose, a run with the sweep's seed would tell nothing
        chosen = {} if any(len(method.rates) > 1 for method in methods) else {"sweep_seed": self.seeds[0]}
        return shared.compare(methods, run, seeds=self.seeds, cache=cache, progress=False, **chosen)


@dataclass(frozen=True)
class Experiment:
    """A part of the benchmark.

    Attributes:
        name: of its file of results.
        held_out: the tasks, in order.
        budget: of every run.
        rows: makes a held-out task's rows.
    """

    name: str
    held_out: Sequence[str]
    budget: Budget
    rows: Callable[[Bench, str], list[Method]]


def perform(bench: Bench, experiment: Experiment, results: Path) -> None:
    """Run an experiment task by task, and write `results`/<name>.json after each.

    Raises:
        OutOfTime: the time is over; what is done is written.
    """
    file = results / f"{experiment.name}.json"
    found: dict[str, Any] = {}
    for name in experiment.held_out:
        began = time.time()
        rows = bench.compare(name, experiment.rows(bench, name), experiment.budget)
        found[name] = [compact(row) for row in rows]
        body = {
            "experiment": experiment.name,
            "budget": asdict(experiment.budget),
            "seeds": list(bench.seeds),
            "tasks": found,
        }
        write_text_aside(
            file,
            json.dumps(plain(body), indent=None, separators=(",", ":")).replace('{"method"', '\n{"method"') + "\n",
        )
        best = ", ".join(f"{row['method']} {100 * (row['test'] or 0):.1f}@{row['rate']:g}" for row in rows)
        print(
            f"{time.strftime('%H:%M:%S')} {experiment.name} {name} ({time.time() - began:.0f} s): {best}", flush=True
        )


def usual_rate(folder: Path, method: str, held_out: str) -> float:
    """Return the rate that a user would take who does not sweep.

    That is the best on average over the other tasks' validation splits, of those that were tried on all of them; the
    smaller of equals.

    Args:
        folder: with the results of ``main``, and ``main-more`` where it is there.

    Raises:
        SubspaceError: no other task's sweep is there.
    """
    sweeps = []
    for file in (folder / "main.json", folder / "main-more.json"):
        listed = json.loads(file.read_text(encoding="utf-8"))["tasks"] if file.is_file() else {}
        sweeps += [
            dict(row["sweep"])
            for task, rows in listed.items()
            if task != held_out
            for row in rows
            if row["method"] == method
        ]
    if not sweeps:
        raise SubspaceError(
            f"{folder} has no sweep of {method!r} on a task other than {held_out!r}: run the group `main` first."
        )
    common = sorted(set.intersection(*(set(sweep) for sweep in sweeps)))
    return max(common, key=lambda rate: sum(sweep[rate] or 0.0 for sweep in sweeps))


def compact(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of `compare` without what tables do not need, numbers rounded to what was measured."""
    short = lambda value: None if value is None else round(value, 5)  # noqa: E731
    return {
        "method": row["method"],
        "rate": row["rate"],
        "at_edge": row["at_edge"],
        "trained": row["trained_adapter"],
        "head": row["trained_head"],
        "tests": [short(test) for test in row["tests"]],
        "validations": [short(value) for value in row["validations"]],
        "sweep": [[each["rate"], short(each["validation"])] for each in row["sweep"]],
        "curves": [[[step, short(value)] for step, value in curve] for curve in row["curves"]],
        "seconds": short(row["seconds"]),
    }
