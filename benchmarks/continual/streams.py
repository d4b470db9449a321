"""Run a method on a stream, test every learned task after each, and keep what was found: one JSON file per stream."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import RunCache
from torch import nn

from benchmarks.quality import tasks
from benchmarks.quality.bench import OutOfTime
from benchmarks.quality.encoder import HalfLinear, half_is_faster
from benchmarks.quality.run import RESULTS as QUALITY
from benchmarks.quality.tasks import Split
from benchmarks.quality.training import make_loss, measure, outputs_of, score

from .learner import NUMBER, Learner
from .setting import ORDERS, SWEEP_ORDER, SWEEP_SEED, SWEEP_TASKS, Data, Stream, in_full

SAMPLE = 128  # validation examples
WIDENINGS = 2  # a best rate at the edge of the sweep asks for one beyond it, at most so often


@dataclass(frozen=True)
class Method:
    """A row of the comparison.

    Attributes:
        name: as tables print it.
        make: makes the learner of a stream at a rate.
        kind: the learner's class, which says the rates and whether tasks are kept apart.
        swept: the name of the method whose rate this one takes; its own by default.
        usual: the row of the quality benchmark whose sweeps over all twelve tasks say the rate; none: a sweep of its
            own.
        version: counts up where a change of the code changes results.
    """

    name: str
    make: Callable[[Data, Stream, float], Learner]
    kind: type[Learner]
    swept: str | None = None
    usual: str | None = None
    version: int = 1

    def identity(self, seed: int | None = None) -> dict[str, Any]:
        """Return what, beside stream and rate, decides the results: the same for every `seed`."""
        return {"method": self.name, "version": self.version}


class Streams:
    """Results of streams, each from the cache or found now.

    Args:
        data: the tasks.
        folder: where results are kept.
        until: `time.time()` at which no further task is begun.
    """

    def __init__(self, data: Data, folder: Path, until: float = float("inf")) -> None:
        self.data, self.folder, self.until = data, folder, until
        self._rates: dict[str, tuple[float, dict[float, float]]] = {}

    def result(self, method: Method, stream: Stream, rate: float, *, sweep: bool = False) -> dict[str, Any]:
        """Return what `run` finds, or `validate` for a sweep, from the cache where it is there.

        Where tasks are kept apart each is a stream of its own, so that it is trained once, whatever the order.
        """
        if method.kind.apart and len(stream.arriving) > 1:
            given = stream.given if method.kind.from_given else ()
            parts = [
                self.result(method, replace(stream, arriving=(name,), given=given), rate, sweep=sweep)
                for name in stream.arriving
            ]
            return joined(parts)
        cache = RunCache(self.folder, {**self.facts(stream), "sweep": sweep})
        found = cache.read(method, rate, stream.seed)
        if found is None:
            learner = method.make(self.data, stream, rate)
            found = cache.write(method, rate, stream.seed, self.run(learner, sweep=sweep))
            print(
                f"{time.strftime('%H:%M:%S')} {method.name} {'-'.join(stream.arriving[:2])} seed {stream.seed}"
                f" rate {rate:g}{' (sweep)' if sweep else ''}: {found['seconds']:.0f} s",
                flush=True,
            )
        return found

    def facts(self, stream: Stream) -> dict[str, Any]:
        """Return what decides results beside method, rate and seed."""
        return {
            **self.data.facts(stream),
            "top": tasks.TOP,
            "tokens": tasks.TOKENS,
            "half": half_is_faster(),
        }

    def rate(self, method: Method) -> tuple[float, dict[float, float]]:
        """Return the rate with the best mean validation score at the end of the sweep's stream, and all tried."""
        if method.name not in self._rates and method.usual is not None:
            scores = usual_sweep(method.usual)
            self._rates[method.name] = (best_of(scores), scores)
        if method.name not in self._rates:
            stream = Stream.of_order(SWEEP_ORDER, SWEEP_SEED)
            stream = replace(stream, arriving=stream.arriving[:SWEEP_TASKS])

            def tried(rate: float) -> float:
                found = self.result(method, stream, rate, sweep=True)["validation"]
                return sum(value or 0.0 for value in found) / len(found)

            self._rates[method.name] = sweep_rates(method.kind.rates, tried)
        return self._rates[method.name]

    def run(self, learner: Learner, *, sweep: bool) -> dict[str, Any]:
        """Learn a stream's tasks; see `record`.

        Raises:
            OutOfTime: the time is over; the stream is begun again by the next call.
        """
        began, record = time.time(), Record(learner)
        for name in learner.stream.arriving:
            if time.time() > self.until:
                raise OutOfTime
            record.learn(name, tested=not sweep)
        if sweep:
            last = [score(learner.model(name), learner.seen(name), "validation") for name in learner.stream.arriving]
            return {"validation": last, "seconds": time.time() - began}
        return {"tasks": list(learner.stream.arriving), **record.found, "seconds": time.time() - began}


class Record:
    """What is measured along one stream.

    Attributes:
        found: ``R``, per task a row of test scores of the tasks learned so far; ``change``, the same of the largest
            change of each task's logits since they were last looked at; ``steps``, facts per task. All tasks of a row
            are tested in a stream `in_full` and after the last task, otherwise the one just learned, and None stands
            for the rest.
    """

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.outputs: dict[str, torch.Tensor] = {}
        self.stored: dict[str, torch.Tensor] = {}
        self.found: dict[str, Any] = {"R": [], "change": [], "steps": []}

    def learn(self, name: str, *, tested: bool) -> None:
        """Learn a task, and test unless this is a sweep's stream."""
        learner = self.learner
        model, facts = learner.learn(name)
        task = learner.seen(name)
        held = sample(task.splits["validation"])
        before = outputs_of(model, held) if tested else None
        exactly = None if before is None or learner.apart else in_float32(model, held)
        facts |= learner.absorb(name)
        own, shared = learner.stored(name)
        facts |= {"task": name, "own_bytes": NUMBER * own, "shared_bytes": NUMBER * shared}
        if before is not None:
            # what storing does to the task itself
            after = before if learner.apart else outputs_of(learner.model(name), held)
            self.stored[name] = after
            loss = make_loss(task, task.splits["train"].labels)
            facts["jump"] = {
                "logits": float((after - before).abs().max()),
                "loss": float(loss(after, held.labels) - loss(before, held.labels)),
                "score": measure(after, held.labels) - measure(before, held.labels),
            }
            if exactly is not None:
                facts["jump"]["float32"] = float((in_float32(learner.model(name), held) - exactly).abs().max())
            row, change = self.test(name)
            self.found["R"].append(row)
            self.found["change"].append(change)
        self.found["steps"].append(facts)

    def test(self, newest: str) -> tuple[list[float | None], list[float | None]]:
        """Return score and largest change of logits of every task learned so far."""
        stream = self.learner.stream
        every = in_full(stream) or newest == stream.arriving[-1]
        row: list[float | None] = []
        change: list[float | None] = []
        for name in stream.arriving[: stream.arriving.index(newest) + 1]:
            if name != newest and not every:
                row.append(None)
                change.append(None)
                continue
            split = self.learner.seen(name).splits["test"]
            now = self.outputs.get(name)
            if now is None or not self.unchanged(name):
                now = outputs_of(self.learner.model(name), split)
            row.append(measure(now, split.labels))
            change.append(float((now - self.outputs.get(name, now)).abs().max()))
            self.outputs[name] = now
        return row, change

    def unchanged(self, name: str) -> bool:
        """Tell whether a task answers as it did, without testing all of it again.

        True where tasks are kept apart, and where some examples' logits are those that they were when it was stored,
        bit for bit.
        """
        if self.learner.apart:
            return True
        some = sample(self.learner.seen(name).splits["validation"])
        return torch.equal(outputs_of(self.learner.model(name), some), self.stored[name])


def in_float32(model: nn.Module, split: Split) -> torch.Tensor:
    """Return a model's outputs with every layer in float32.

    The frozen layers' weights are those rounded to bfloat16; the model is left as it was.
    """
    halves = [module for module in model.modules() if isinstance(module, HalfLinear)]
    for module in halves:
        module.float()
    try:
        return outputs_of(model, split)
    finally:
        for module in halves:
            module.bfloat16()


def sample(split: Split) -> Split:
    """Return the first examples of a split, on which logits are held against one another."""
    return split.take(torch.arange(min(SAMPLE, len(split))))


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the result of a stream whose tasks are kept apart, from those of each: nothing changes afterwards."""
    whole: dict[str, Any] = {"seconds": sum(part["seconds"] for part in parts)}
    if "validation" in parts[0]:
        return {**whole, "validation": [part["validation"][0] for part in parts]}
    scores = [part["R"][0][0] for part in parts]
    return {
        **whole,
        "tasks": [part["tasks"][0] for part in parts],
        "R": [scores[: i + 1] for i in range(len(parts))],
        "change": [[0.0] * (i + 1) for i in range(len(parts))],
        "steps": [part["steps"][0] for part in parts],
    }


def sweep_rates(rates: Sequence[float], tried: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """Return the best rate, the smaller of equals, and each rate's score; widened where the best is at an edge."""
    scores = {rate: tried(rate) for rate in rates}
    for _ in range(WIDENINGS):
        ordered, best = sorted(scores), best_of(scores)
        if best == ordered[0]:
            beyond = ordered[0] ** 2 / ordered[1]
        elif best == ordered[-1]:
            beyond = ordered[-1] ** 2 / ordered[-2]
        else:
            break
        scores[beyond] = tried(beyond)
    return best_of(scores), scores


def best_of(scores: Mapping[float, float]) -> float:
    """Return the rate with the best score, the smaller of equals."""
    return max(scores, key=lambda rate: (scores[rate], -rate))


def usual_sweep(row: str, folder: Path = QUALITY) -> dict[float, float]:
    """Return each rate's mean validation score over all tasks of the quality benchmark's main table.

    Only of rates that were tried on every task.

    Args:
        row: its name there.
        folder: the results.
    """
    body = json.loads((folder / "main.json").read_text(encoding="utf-8"))
    sweeps = [dict(each["sweep"]) for rows in body["tasks"].values() for each in rows if each["method"] == row]
    common = sorted(set.intersection(*(set(sweep) for sweep in sweeps)))
    return {rate: sum(sweep[rate] or 0.0 for sweep in sweeps) / len(sweeps) for rate in common}


def every_stream(orders: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, Stream]]:
    """Return the streams in the order in which they are run: all orders of a seed before the next seed."""
    return [(order, Stream.of_order(order, seed)) for seed in seeds for order in orders if order in ORDERS]
