"""Experiments: held-out task by task, results written as they come."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import Method
from common.run_cache import plain

from subspace_peft._io.atomic import write_text_aside
from subspace_peft.errors import SubspaceError

from .bench import Bench
from .training import Budget


@dataclass(frozen=True)
class Experiment:
    """A part of the benchmark.

    Attributes:
        name: of its file of results.
        held_out: the tasks, in order.
        budget: of every run.
        rows: makes a held-out task's rows.
        folder: of its results, in that of all results.
        seeds, sweep_seeds, head_rates, tested: as of `Bench.compare`.
    """

    name: str
    held_out: Sequence[str]
    budget: Budget
    rows: Callable[[Bench, str], list[Method]]
    folder: str = ""
    seeds: Sequence[int] | None = None
    sweep_seeds: Sequence[int] | None = None
    head_rates: Sequence[float] = ()
    tested: bool = True


def perform(bench: Bench, experiment: Experiment, results: Path) -> None:
    """Run an experiment task by task, and write <name>.json, in its folder of `results`, after each.

    Raises:
        OutOfTime: the time is over; what is done is written.
    """
    file = results / experiment.folder / f"{experiment.name}.json"
    found: dict[str, Any] = {}
    for name in experiment.held_out:
        began = time.time()
        rows = bench.compare(
            name,
            experiment.rows(bench, name),
            experiment.budget,
            seeds=experiment.seeds,
            sweep_seeds=experiment.sweep_seeds,
            head_rates=experiment.head_rates,
            tested=experiment.tested,
        )
        found[name] = [compact(row) for row in rows]
        body = {
            "experiment": experiment.name,
            "budget": asdict(experiment.budget),
            "seeds": list(bench.seeds if experiment.seeds is None else experiment.seeds),
            **({"sweep_seeds": list(experiment.sweep_seeds)} if experiment.sweep_seeds else {}),
            **({"head_rates": list(experiment.head_rates)} if experiment.head_rates else {}),
            "tasks": found,
        }
        write_text_aside(
            file,
            json.dumps(plain(body), indent=None, separators=(",", ":")).replace('{"method"', '\n{"method"') + "\n",
        )
        best = ", ".join(f"{row['method']} {shown(row):.1f}@{row['rate']:g}" for row in rows)
        print(
            f"{time.strftime('%H:%M:%S')} {experiment.name} {name} ({time.time() - began:.0f} s): {best}", flush=True
        )


def shown(row: Mapping[str, Any]) -> float:
    """Return the mean score of a row in points: of its tests, or of its validations where nothing was tested."""
    scores = row["tests"] if any(test is not None for test in row["tests"]) else row["validations"]
    return 100 * sum(score or 0.0 for score in scores) / len(scores)


def usual_rate(folder: Path, method: str, held_out: str) -> float:
    """Return the rate that a user would take who does not sweep.

    That is the best on average over the other tasks' validation splits, of those that were tried on all of them; the
    smaller of equals.

    Args:
        folder: with the results of ``main``, and ``main-more`` and ``main-rest`` where they are there.

    Raises:
        SubspaceError: no other task's sweep is there.
    """
    sweeps = []
    for file in (folder / f"{name}.json" for name in ("main", "main-more", "main-rest")):
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
    more: dict[str, Any] = {"head_rate": row["head_rate"]} if "head_rate" in row else {}
    if any("validations" in each for each in row["sweep"]):
        # of each of the sweep's seeds, beside the means
        more["tried"] = [
            [each["rate"], *([short(value) for value in each[key]] for key in ("validations", "tests"))]
            for each in row["sweep"]
        ]
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
        **more,
    }
