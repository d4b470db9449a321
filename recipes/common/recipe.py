"""The stages of a recipe, with its own data, model and Trainer; each keeps its results and finds those before it."""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback

from subspace_peft._io.atomic import write_text_aside
from subspace_peft.base_names import same_model
from subspace_peft.errors import SubspaceError
from subspace_peft.sources import open_source
from subspace_peft.tasks.callbacks import SubspaceCardCallback, note_metrics

from .arguments import CommonArguments, quiet
from .choice import KEYS, Candidate, choose_smallest, note_choice, write_choice
from .extras import require
from .measure import measure
from .methods import Method, adapted, lora, method_named
from .run_cache import RunCache, digest
from .stages import (
    basis_stage,
    candidate_methods,
    check_converged,
    compared_methods,
    finished,
    last_checkpoint,
    publish,
    put_beside_controls,
    save_finished,
    task_folder,
)
from .sweep import compare, finished_run, finite_score, try_rates
from .task import Task
from .training import fit

STAGES = ("sources", "basis", "train", "evaluate", "compare")


@dataclass(frozen=True)
class Recipe:
    """The parts that a recipe brings of its own.

    Attributes:
        load_task: ``load_task(args, name)`` reads and checks a task.
        make_model: ``make_model(args, task, seed)``, the base model for it, under a head drawn by `seed` if there is
            one.
        make_trainer: ``make_trainer(args, model, task, rate=, epochs=, examples=, seed=, folder=)``, a Trainer that
            evaluates every epoch, with checkpoints and a bar where a folder is given. Its defaults serve to evaluate.
        test: ``test(args, model, task)`` → ``test``, the score; ``metrics``; and what else evaluating should print,
            by name.
        decisive: the arguments that decide how good any adapter gets; each stage adds its own.
        head: name of the trained head, or None.
        task_type: as PEFT's; None where PEFT has to be told the head's name.
    """

    load_task: Callable[[Any, str], Any]
    make_model: Callable[[Any, Any, int], nn.Module]
    make_trainer: Callable[..., Any]
    test: Callable[[Any, nn.Module, Any], dict[str, Any]]
    decisive: Sequence[str]
    head: str | None
    task_type: str | None

    def run(self, args: CommonArguments, known: Mapping[str, Any]) -> None:
        """Do the stages that `args.stage` names. `known`: task → what is known of it, as `choose_sources` takes it.

        Raises:
            SubspaceError: what a stage needs is not there, or does not fit; a training diverged.
        """
        require("datasets", "evaluate", "matplotlib", "rouge_score", "scipy", "sklearn")
        quiet()
        stages = STAGES if args.stage == "all" else (args.stage,)
        names = [args.task] if {"train", "evaluate", "compare", "choose"} & set(stages) else []
        names += [name for name in args.sources if "/" not in name] if "sources" in stages else []
        tasks = {name: self.load_task(args, name) for name in tqdm(names, desc="reading tasks", unit="task")}
        for stage in stages:
            if stage == "basis":
                if PartialState().is_main_process:
                    basis_stage(args)
                PartialState().wait_for_everyone()
            elif stage == "sources":
                self.sources(args, tasks)
            else:
                getattr(self, stage)(args, tasks[args.task], known)

    def settings(self, args: Any, task: Task, *names: str) -> dict[str, Any]:
        """Return all that decides a run's result: another value of any of it is another run."""
        chosen = {name: getattr(args, name) for name in (*self.decisive, *names)}
        return {"task": task.name, "data": task.fingerprint(), **chosen}

    def methods(self, args: CommonArguments, known: Mapping[str, Any], *, control: bool = False) -> list[Method]:
        """Return the rows of the comparison, see `compared_methods`."""
        return compared_methods(args, known, control=control, task_type=self.task_type, **self._where(args))

    def _where(self, args: CommonArguments) -> dict[str, Any]:
        saved = [self.head] if self.head is not None and self.task_type is None else None
        return {"target_modules": args.target_modules, "layers": args.layers, "modules_to_save": saved}

    def sources(self, args: CommonArguments, tasks: Mapping[str, Task]) -> None:
        """Train a stock LoRA adapter for each source task; adapters that exist are fetched, and checked."""
        method = lora(args.source_r, adapted(task_type=self.task_type, **self._where(args)))
        for name in tqdm(args.sources, desc="source adapters", unit="adapter"):
            if "/" in name:
                if not same_model(base := open_source(name).base_model, args.model):
                    raise SubspaceError(f"{name} was trained on {base}, not on {args.model}. Leave it out.")
                continue
            task, folder = tasks[name], Path(args.out, "sources", name)
            chosen = self.settings(args, task, "source_examples", "source_epochs", "source_rate", "source_r", "seed")
            if finished(folder, chosen) is None:
                model = self.make_model(args, task, args.seed)
                # a start of its own: with one random A for all, they would fake a common subspace
                torch.manual_seed(zlib.crc32(f"{args.seed}/{name}".encode()))
                model = method.apply(model, self.head)
                budget = {"rate": args.source_rate, "epochs": args.source_epochs, "examples": args.source_examples}
                result = fit(self.make_trainer(args, model, task, seed=args.seed, **budget))
                _on_main(save_finished, model, folder, chosen, result)

    def train(self, args: Any, task: Task, known: Mapping[str, Any]) -> None:
        """Train coefficients on the held-out task and save them by PEFT; resume from the last checkpoint."""
        folder = task_folder(args)
        method = method_named(self.methods(args, known), "mean only" if args.coefficients == "none" else "this basis")
        chosen = self.settings(args, task, "rate", "epochs", "train_examples", "seed")
        chosen["method"] = method.identity()
        if finished(folder, chosen) is None:
            model = method.apply(self.make_model(args, task, args.seed), self.head)
            checkpoints = Path(args.out, "checkpoints", f"{folder.name}-{digest(chosen)[:12]}")
            budget = {"rate": args.rate, "epochs": args.epochs, "examples": args.train_examples}
            trainer = self.make_trainer(args, model, task, seed=args.seed, folder=checkpoints, **budget)
            trainer.add_callback(SubspaceCardCallback())
            result = check_converged(folder, fit(trainer, last_checkpoint(checkpoints)))
            tested = self.test(args, model, task)
            _note_tests(model, tested["metrics"])
            _on_main(save_finished, model, folder, chosen, result | {key: tested[key] for key in ("test", "metrics")})
            _on_main(shutil.rmtree, checkpoints)
        print(f"The task is in {folder}.")

    def evaluate(self, args: CommonArguments, task: Task, known: Mapping[str, Any]) -> None:
        """Measure the saved task, loaded in the plain way, on the test splits."""
        folder = task_folder(args)
        if not (folder / "adapter_config.json").is_file():
            raise SubspaceError(
                f"No saved task in {folder}: run --stage train first, with the same --out and --coefficients."
            )
        model = PeftModel.from_pretrained(self.make_model(args, task, args.seed), str(folder))
        tested = self.test(args, model, task)
        del tested["test"]
        metrics = json.dumps(tested.pop("metrics"), indent=1)
        _on_main(write_text_aside, folder / "metrics.json", metrics + "\n")
        lines = [f"{folder}: {json.dumps(json.loads(metrics))}", *(f"{key}:\n{tested[key]}" for key in tested)]
        _on_main(print, "\n".join(lines))

    def compare(self, args: Any, task: Task, known: Mapping[str, Any]) -> None:
        """Train every method under one budget; write results.json, table.md and curves.png.

        The card of the trained task, if there is one, gets the table.
        """
        rows = self.methods(args, known, control=args.coefficients != "none")
        # a basis that does not fit the model is refused here, before the first run
        rows[-1].apply(self.make_model(args, task, 0), self.head)

        def run(method: Method, rate: float | None, seed: int) -> dict[str, Any]:
            model, result = self._run(args, task, method, rate, seed)
            # rates are chosen on the validation split: the sweep's runs never see the test split
            if seed in args.seeds:
                tested = self.test(args, model, task)
                result |= {key: tested[key] for key in ("test", "metrics")}
            return result

        chosen = self._run_settings(args, task)
        results = compare(rows, run, seeds=args.seeds, cache=RunCache(Path(args.out, "cells"), chosen))
        title = f"{task.name}: {task.score_name} on {len(task.splits['test'])} test examples, {_budget(args)}"
        folder = Path(args.out, "compare", Path(task.name).name)
        score = f"validation {task.validation_name}"
        _on_main(lambda: publish(results, folder, title=title, settings=chosen, score=score))
        _on_main(put_beside_controls, task_folder(args), folder, chosen)

    def choose(self, args: Any, task: Task, known: Mapping[str, Any]) -> None:
        """Train the `candidates` under one budget, choose one by validation; save and test it, and write `choice.md`.

        Of each candidate the adapter of its best rate stays in the folder `adapters`.
        """
        rows = candidate_methods(args, known, task_type=self.task_type, **self._where(args))
        # a basis that does not fit the model is refused here, before the first run
        rows[0].apply(self.make_model(args, task, 0), self.head)
        settings, seed = self._run_settings(args, task), args.seed
        cache = RunCache(Path(args.out, "cells"), settings)

        def folder_of(method: Method, rate: float) -> Path:
            return Path(args.out, "adapters", cache.file(method, rate, seed).stem)

        def run(method: Method, rate: float | None, seed: int) -> dict[str, Any]:
            model, result = self._run(args, task, method, rate, seed, SubspaceCardCallback())
            converged = rate is not None and math.isfinite(finite_score(result["validation"]))
            result["without"] = task.validations_without(self.make_trainer(args, model, task)) if converged else []
            if rate is not None and converged:
                _on_main(save_finished, model, folder_of(method, rate), cache.identity(method, rate, seed), result)
            return result

        def load(method: Method, rate: float) -> nn.Module:
            if finished(folder_of(method, rate), cache.identity(method, rate, seed)) is None:
                # its scores were kept, but not its adapter
                cache.write(method, rate, seed, run(method, rate, seed))
            return PeftModel.from_pretrained(self.make_model(args, task, seed), str(folder_of(method, rate)))

        found = []
        with tqdm(total=sum(len(row.rates) for row in rows), desc="choosing", unit="run") as bar:
            for method in rows:
                bar.set_postfix_str(method.name)
                found.append(
                    Candidate.of(method, tried := try_rates(method, run, cache=cache, seed=seed, keys=KEYS, bar=bar))
                )
                for rate in tried.keys() - {found[-1].rate}:
                    _on_main(shutil.rmtree, folder_of(method, rate), True)
        choice = choose_smallest(found, standard_errors=args.standard_errors)
        folder, tests = task_folder(args, "chosen"), {}
        others = [each for each in choice.candidates if each is not choice.chosen] if args.test_others else []
        for each in [choice.chosen, *others]:
            model, result = None, finished_run(each.method, each.rate, seed, run, cache, keys=KEYS)
            if result["metrics"] is None:
                model = load(each.method, each.rate)
                tested = self.test(args, model, task)
                result = {**result, "test": tested["test"], "metrics": tested["metrics"]}
                result = cache.write(each.method, each.rate, seed, result)
            tests[each.method.name] = result["test"]
            chosen = cache.identity(each.method, each.rate, seed) | {"standard_errors": args.standard_errors}
            chosen["among"] = [row.identity() for row in rows]
            if each is choice.chosen and finished(folder, chosen) is None:
                model = model or load(each.method, each.rate)
                _note_tests(model, result["metrics"])
                _on_main(save_finished, model, folder, chosen, result)
                _on_main(note_choice, folder, choice, tests)
        count = len(task.splits["validation"])
        title = f"{task.name}: {task.validation_name} on {count} validation examples, {_budget(args)}"
        place = Path(args.out, "choose", Path(task.name).name)
        _on_main(lambda: print(write_choice(choice, place, title=title, settings=settings, tests=tests)))
        _on_main(print, f"The chosen adapter is in {folder}.")

    def _run(
        self, args: Any, task: Task, method: Method, rate: float | None, seed: int, *callbacks: TrainerCallback
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Train a method, untested; without a rate, evaluate it alone."""
        model = method.apply(self.make_model(args, task, seed), self.head)
        sizes, budget = measure(model), {"epochs": args.epochs, "examples": args.train_examples, "rate": rate}
        budget |= {} if rate is not None else {"epochs": 0, "examples": 1, "rate": 0.0}
        trainer = self.make_trainer(args, model, task, seed=seed, **budget)
        for callback in callbacks:
            trainer.add_callback(callback)
        return model, {**sizes, **fit(trainer), "test": None, "metrics": None}

    def _run_settings(self, args: Any, task: Task) -> dict[str, Any]:
        """Return what the runs of a comparison, and of a choice, have in common."""
        return self.settings(args, task, "epochs", "train_examples") | {"score": task.score_name}


def _budget(args: Any) -> str:
    examples = args.train_examples or "all"
    return f"{args.epochs:g} epochs of {examples} training examples, {Path(args.model).name}"


def _note_tests(model: nn.Module, metrics: Mapping[str, Any]) -> None:
    """Have the card tell what the recipe's `test` measured: on several splits by their names, or on one."""
    splits = metrics if all(isinstance(numbers, Mapping) for numbers in metrics.values()) else {"test": metrics}
    for split, numbers in splits.items():
        # the score is one of the others, under their names
        note_metrics(model, split, {name: each for name, each in numbers.items() if name != "score"})


def _on_main(do: Callable[..., Any], *given: Any) -> None:
    """Do it in one process of those that `accelerate launch` started; all wait for it."""
    if PartialState().is_main_process:
        do(*given)
    PartialState().wait_for_everyone()
