"""Cell by cell: rates on three tasks, then every row on every held-out task, seed by seed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import common as shared
import torch
from common import Method
from offline.models import LANGUAGE_MODEL
from peft import PeftConfig, get_peft_model

from subspace_peft.tuner import SubspaceConfig

from ..bench import OutOfTime
from ..training import Budget
from .answers import measure
from .cells import Cells
from .decoding import greedy
from .encoded import EncodedTask, load
from .fleet import Fleet
from .model import bottom_of, top_of, whole_model
from .prompts import ORDER, facts
from .rows import RATE_OF, row
from .setting import ANSWER, BUDGET, DECODED, SEEDS, SIZES, SOURCE_BUDGET, SWEEP_SEED, TEXT, TOP, spent
from .training import train

TUNED = ("reviews", "noun-kinds", "sentences")  # an opinion, a label of nine, a phrase
WIDENINGS = 1


@dataclass
class LanguageBench:
    """Where things are kept, and what may be spent.

    Attributes:
        folder: cache of hidden states, source adapters and runs.
        results: folder of the results, one file per task in a folder per choice of modules.
        targets: ``qv`` or ``linear``.
        until: `time.time()` at which no further run begins.
        names: the tasks, each held out in turn, in order; together they are the fleet.
        tuned: tasks on which rates are tried.
        seeds: report seeds.
        budget, source_budget: of the cells and of the fleet.
    """

    folder: Path
    results: Path
    targets: str = "qv"
    until: float = float("inf")
    names: Sequence[str] = ORDER
    tuned: Sequence[str] = TUNED
    seeds: Sequence[int] = SEEDS
    budget: Budget = BUDGET
    source_budget: Budget = SOURCE_BUDGET
    _tasks: dict[str, EncodedTask] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.fleet = Fleet(self.folder, self.targets, self.task, self.top, self.names, self.source_budget)

    def task(self, name: str) -> EncodedTask:
        """Return a task, kept or computed now. Raises `OutOfTime`: whatever wants it is not begun any more."""
        if time.time() > self.until:
            raise OutOfTime
        if name not in self._tasks:
            self._tasks = {name: load(name, self.folder)}
        return self._tasks[name]

    def top(self) -> Any:
        return top_of(whole_model(self.folder)[0])

    def cells(self, name: str) -> Cells:
        """Return the finished cells of a held-out task."""
        settings = {
            "task": name,
            **facts(name),
            "model": LANGUAGE_MODEL.sha256,
            "top": TOP,
            "targets": self.targets,
            "lengths": [TEXT, ANSWER],
            "sizes": SIZES,
            "decoded": DECODED,
            **spent(self.budget),
        }
        return Cells(
            self.folder / "cells" / self.targets / name, settings, self.results / self.targets / f"{name}.json"
        )

    def usual_rate(self, name: str, held_out: str) -> tuple[float, ...]:
        """Return the one rate of a row on a held-out task: the best on average over the other tuned tasks.

        That is by the validation split; the smaller of equals. A row that is not trained has none.
        """
        name = RATE_OF.get(name, name)
        sweeps = []
        for task in self.tuned:
            if task != held_out:
                method = row(name, self.fleet, task, SWEEP_SEED)
                if not method.rates:
                    return ()
                found = self._compare(task, [method], SWEEP_SEED, WIDENINGS)[0]["sweep"]
                sweeps.append({each["rate"]: each["validation"] for each in found})
        common = sorted(set.intersection(*map(set, sweeps)))
        score = lambda sweep, rate: float("-inf") if sweep[rate] is None else sweep[rate]  # noqa: E731
        return (max(common, key=lambda rate: sum(score(sweep, rate) for sweep in sweeps)),)

    def perform(self, rows: Sequence[str], only: Sequence[str] | None = None) -> None:
        """Run rows on all held-out tasks, one seed after the other.

        Args:
            rows: their names.
            only: of the held-out tasks; all without it.

        Raises:
            OutOfTime: the time is over; what is done is written.
        """
        for seed in self.seeds:
            for name in [task for task in self.names if only is None or task in only]:
                began = time.time()
                # not trained, it is the same with every seed
                chosen = [each for each in rows if each != "zero-shot" or seed == self.seeds[0]]
                methods = [
                    replace(row(each, self.fleet, name, seed), rates=self.usual_rate(each, name)) for each in chosen
                ]
                found = self._compare(name, methods, seed, 0)
                if time.time() - began > 1:
                    told = ", ".join(f"{each['method']} {-(each['test'] or 0):.3f}" for each in found)
                    print(f"{time.strftime('%H:%M:%S')} {self.targets} {name} seed {seed}: {told}", flush=True)

    def _compare(self, name: str, methods: Sequence[Method], seed: int, widenings: int) -> list[dict[str, Any]]:
        def run(method: Method, rate: float | None, seed: int) -> Mapping[str, Any]:
            return self.run(name, method, rate, seed)

        given = {"seeds": (seed,), "sweep_seed": seed, "widenings": widenings, "progress": False}
        return shared.compare(methods, run, cache=self.cells(name), **given)

    def run(self, name: str, method: Method, rate: float | None, seed: int) -> dict[str, Any]:
        """Train and measure one cell. Raises `OutOfTime`."""
        task = self.task(name)
        config = None if method.adapter is None else method.adapter()
        torch.manual_seed(seed)
        if config is None:
            model = self.top()
            result = {"validation": -measure(model, task, "validation")["nll"], "curve": [], "seconds": 0.0}
        else:
            model = get_peft_model(self.top(), config)
            assert rate is not None
            result = train(model, task, self.budget, rate, seed)
        adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
        result |= {"trained_adapter": adapter, "trained_head": 0, "bytes": 4 * adapter, "data": task.digest}
        if isinstance(config, SubspaceConfig):
            result["basis"] = _fingerprint(config)
        if seed == SWEEP_SEED:
            # chosen by validation: the test is not looked at
            return {**result, "test": None, "metrics": {}}
        began = time.perf_counter()
        metrics = measure(model, task, "test")
        if not task.words:
            metrics["rougeL"] = self._rouge(model, task)
        return {**result, "test": -metrics["nll"], "metrics": metrics, "test_seconds": time.perf_counter() - began}

    def _rouge(self, model: Any, task: EncodedTask) -> float:
        whole, tokenizer = whole_model(self.folder)
        made = greedy(model, bottom_of(whole), task, end=tokenizer.eos_token_id, count=DECODED, new_tokens=ANSWER)
        texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in made]
        return shared.exact_and_rouge(texts, task.answers[: len(texts)])["rougeL"]


def _fingerprint(config: PeftConfig) -> str | None:
    basis = config.resolve()
    return None if basis is None else basis.fingerprint
