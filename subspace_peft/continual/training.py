"""Train and measure one task: the stock Trainer inside, or the user's own functions, each from a seed of its own."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.utils import find_labels

from ..basis import SubspaceBasis
from ..errors import SubspaceError
from ..logging import get_logger
from ..tuner import SubspaceConfig
from .base_model import check_trained_on
from .data import Facts, check_head, check_labelled
from .journal import finite
from .watching import Bar, Watch, newest_checkpoint, not_finite

logger = get_logger()

MACHINE = {"runtime", "second", "time", "epoch"}  # words of metrics that are about the machine
LOGITS = 16  # examples of an evaluation batch at most, by which the absorption is measured


@dataclass(frozen=True)
class TaskRun:
    """One training of a task, as the function ``train`` of a `ContinualLearner` gets it.

    Attributes:
        name: the task.
        train_dataset: what to train on.
        validation_dataset: what to judge by while training, if anything.
        share: the share of a whole training's steps to take: 1, or less in a probe.
        seed: set when the function is called; for generators of one's own.
        folder: a folder for checkpoints, kept until the task is learned.
    """

    name: str
    train_dataset: Any
    validation_dataset: Any
    share: float
    seed: int
    folder: Path


@dataclass
class TaskData:
    """What a learner knows of a task in this process: its data, and how it is scored.

    Attributes:
        name: the task.
        train: its training data; None where it comes from a LoRA.
        evaluation: the data that R is measured on.
        validation: the data that a probe is judged by; None: part of the training data.
        lora: reference of the LoRA that it comes from, or None.
        compute_metrics: as the Trainer takes it.
        metric: which of the metrics is the score; or a function of model and data set that returns it.
        args: the training's arguments.
    """

    name: str
    train: Any
    evaluation: Any
    validation: Any
    lora: Any
    compute_metrics: Callable[[Any], Mapping[str, float]] | None
    metric: str | Callable[[nn.Module, Any], float] | None
    args: TrainingArguments


@dataclass
class Workshop:
    """Makes, trains and measures models.

    Attributes:
        model: a base model, which stays as it is, or a function that returns a fresh one for a task's name.
        config: the configuration of every task, without a basis.
        train: the user's own training, instead of the Trainer's.
        trainer: further keywords of the Trainer, such as ``processing_class``.
        scratch: a folder that the Trainer may make where it only measures.
        progress: show bars.
        facts: task → what is known of its data, which a classifier has to fit.
    """

    model: nn.Module | Callable[[str], nn.Module]
    config: SubspaceConfig
    scratch: Path
    train: Callable[[nn.Module, TaskRun], object] | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)
    progress: bool = True
    facts: dict[str, list[Facts]] = field(default_factory=dict)

    def base(self, name: str) -> nn.Module:
        """Return a base model for a task; of a model that was given, another of the same weights in memory.

        Raises:
            SubspaceError: the function returns no model, or an adapted one.
        """
        if isinstance(self.model, nn.Module):
            return twin(self.model)  # its classifier was held against the data before
        made = self.model(name)
        if not isinstance(made, nn.Module) or hasattr(made, "peft_config"):
            kind = "a model with adapters" if isinstance(made, nn.Module) else f"a {type(made).__name__}"
            raise SubspaceError(
                f"The function for base models returned {kind} for task {name!r}. Return a base model, a fresh one at"
                " each call."
            )
        for facts in self.facts.get(name, ()):
            check_head(name, facts, outputs_of(made))
        return made

    def check(self, data: TaskData, trained: Mapping[str, Path]) -> None:
        """Check that a base model for a task can be trained on its data and scored by them.

        Args:
            data: the task.
            trained: saved tasks of the run, with their folders.

        Raises:
            SubspaceError: it does not fit the labels, the data have none, or nothing says how it is scored; it is not
                the base model of the saved tasks.
        """
        model = self.base(data.name)
        for task, folder in trained.items():
            check_trained_on(model, task, folder)
        check_scored(data, model)
        if {"data_collator", "compute_loss_func"} & self.trainer.keys():
            return  # which may make labels, or need none
        names = data.args.label_names or find_labels(type(model))
        used = {"training": None if self.train is not None else data.train}
        if not callable(data.metric):
            used |= {"validation": data.validation, "evaluation": data.evaluation}
        for what, each in used.items():
            if each is not None:
                check_labelled(data.name, what, each, names)

    def adapted(self, name: str, basis: SubspaceBasis, extra_rank: int) -> PeftModel:
        """Return a base model with a new task on it.

        Args:
            name: the task.
            basis: the basis.
            extra_rank: φ, how many directions of its own it gets per module.
        """
        config = copy.deepcopy(self.config)
        config.basis = basis
        config.extra_rank = extra_rank
        if not extra_rank:
            config.extra_rank_pattern = {}  # it says where a task has more or fewer, not whether it has any
        base = self.base(name)
        config.task_type = config.task_type or task_type(base)
        config.id2label = config.id2label or _labels_of(base)
        return get_peft_model(base, config)

    def loaded(self, name: str, folder: Path) -> PeftModel:
        """Return a base model with a saved task on it."""
        base = self.base(name)
        try:
            return PeftModel.from_pretrained(base, str(folder))
        except RuntimeError as error:
            wrong = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
            if not wrong:
                raise
            raise SubspaceError(
                f"Task {name!r}: it does not fit the base model that it is loaded on: {wrong[0]} Give a base model of"
                " the same sizes, with as many outputs as the task's classifier has."
            ) from error

    def fit(self, model: PeftModel, data: TaskData, run: TaskRun) -> None:
        """Train a model's task.

        A whole training goes on from its newest checkpoint in ``run.folder``, where the arguments had it keep any.

        Raises:
            SubspaceError: parameters are not finite afterwards.
        """
        set_seed(run.seed)
        if self.train is not None:
            self.train(model, run)
        else:
            self._fit(model, data, run)
        if wrong := not_finite(model):
            raise SubspaceError(
                f"Task {run.name!r}: the training diverged: {wrong} is not finite. Lower the learning rate"
                " (learning_rate of the training's arguments), look for bad examples, and begin the task again with"
                " restart=True (--restart). What was learned before is unharmed."
            )

    def _fit(self, model: PeftModel, data: TaskData, run: TaskRun) -> None:
        args, whole = self._arguments(data, run.seed, run.folder), run.share == 1
        if not whole:
            args.save_strategy, args.eval_strategy = "no", "no"
            args.load_best_model_at_end = False
            args.max_steps = max(1, round(run.share * args.max_steps)) if args.max_steps > 0 else args.max_steps
            args.num_train_epochs = run.share * args.num_train_epochs
        what = f"training {run.name}" if whole else f"probing {run.name}"
        bar = Bar(what, shown=self.progress and not args.disable_tqdm)
        callbacks = [*(self.trainer.get("callbacks") or ()), Watch(), bar]
        args.disable_tqdm = True
        trainer = Trainer(
            model,
            args,
            train_dataset=run.train_dataset,
            eval_dataset=run.validation_dataset if args.eval_strategy != "no" else None,
            compute_metrics=data.compute_metrics,
            **{**self.trainer, "callbacks": callbacks},
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=newest_checkpoint(run.folder) if whole else None)

    def score(self, model: nn.Module, data: TaskData, dataset: Any) -> float:
        """Return a model's score on a data set; more is better.

        Raises:
            SubspaceError: nothing says which metric is the score, or it is no finite number.
        """
        model.eval()
        what = f"The score of task {data.name!r}"
        if callable(data.metric):
            with torch.no_grad():
                return finite(what, data.metric(model, dataset))
        check_scored(data, model)
        trainer = self._measuring(model, data, data.compute_metrics or accuracy)
        found = trainer.evaluate(dataset, metric_key_prefix="eval")
        own = {key.removeprefix("eval_"): value for key, value in found.items() if key != "eval_loss"}
        known = {key: value for key, value in own.items() if not MACHINE.intersection(key.split("_"))}
        name = data.metric or (next(iter(known)) if len(known) == 1 else None)
        if name not in own:
            wrong = f"no metric is called {name!r}" if name else "several metrics are measured"
            raise SubspaceError(
                f"Task {data.name!r}: {wrong}. Say which one is the score with metric=; measured are"
                f" {', '.join(known) or 'none'}."
            )
        return finite(f"{what}, {name},", own[name])

    def logits(self, model: nn.Module, data: TaskData, dataset: Any) -> torch.Tensor:
        """Return a model's answers to a data set, float32: its first output, flattened."""
        model.eval()
        found = self._measuring(model, data, None).predict(dataset).predictions
        first = found[0] if isinstance(found, (tuple, list)) else found
        return torch.as_tensor(np.asarray(first), dtype=torch.float32).flatten()

    def _measuring(self, model: nn.Module, data: TaskData, compute: Any) -> Trainer:
        args = self._arguments(data, 0, self.scratch)
        args.disable_tqdm, args.eval_strategy, args.save_strategy, args.load_best_model_at_end = (
            True,
            "no",
            "no",
            False,
        )
        args.report_to = []
        # callbacks of the user are about trainings
        more = {key: value for key, value in self.trainer.items() if key not in ("callbacks", "optimizers")}
        trainer = Trainer(model, args, compute_metrics=compute, **more)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _arguments(self, data: TaskData, seed: int, folder: Path) -> TrainingArguments:
        args = copy.deepcopy(data.args)
        args.output_dir, args.seed, args.data_seed = str(folder), seed, seed
        return args


def task_type(model: nn.Module) -> str | None:
    """Return PEFT's task type of a model, as far as the name of its class says it."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    name = type(inner).__name__
    ends = {
        "ForSequenceClassification": "SEQ_CLS",
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
    }
    return next((kind for end, kind in ends.items() if name.endswith(end)), None)


def _labels_of(model: nn.Module) -> dict[int, str] | None:
    """Return the names of a classifier's labels by number; None where they are the ones that stand for none."""
    found = getattr(model.config, "id2label", None) if task_type(model) == "SEQ_CLS" else None
    named = found and any(name != f"LABEL_{place}" for place, name in found.items())
    return dict(found) if named else None


def outputs_of(model: nn.Module) -> int | None:
    """Return how many outputs a classifier has; None of other models."""
    return getattr(model.config, "num_labels", None) if task_type(model) == "SEQ_CLS" else None


def check_scored(data: TaskData, model: nn.Module) -> None:
    """Check that a task has a score: one of its own, or that of classifiers.

    Args:
        data: the task.
        model: a base model for it, or an adapted one.

    Raises:
        SubspaceError: nothing says what its score is.
    """
    if callable(data.metric) or data.compute_metrics is not None:
        return
    if task_type(model) != "SEQ_CLS":
        raise SubspaceError(
            f"Task {data.name!r}: nothing says how it is scored. Give compute_metrics=, as the Trainer takes it, or"
            " metric=, a function of model and data set; more is better."
        )
    if outputs_of(model) == 1:
        raise SubspaceError(
            f"Task {data.name!r}: its model has one output, which is no classifier to count right answers of. Give"
            " compute_metrics= or metric= for a number that is predicted; more is better, so negate an error."
        )


def accuracy(answers: Any) -> dict[str, float]:
    """Return the share of examples whose largest logit is their label's: the score of classifiers by default."""
    logits = answers.predictions[0] if isinstance(answers.predictions, tuple) else answers.predictions
    return {"accuracy": float((np.asarray(logits).argmax(-1) == np.asarray(answers.label_ids)).mean())}


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Set all generators to a seed within, and give the caller's back afterwards."""
    state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    set_seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)


def check_unadapted(model: nn.Module) -> None:
    """Raise `SubspaceError` where a base model has adapters, or is spread over devices by hooks."""
    if hasattr(model, "peft_config"):
        raise SubspaceError("The base model has adapters already. Give it as it was loaded, before `get_peft_model`.")
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise SubspaceError(
            "The base model is spread over devices by accelerate, and cannot be shared by several tasks. Give a"
            " function that loads it: `lambda task: AutoModel….from_pretrained(base, device_map=…)`."
        )


def twin(model: nn.Module) -> nn.Module:
    """Return a copy of a model's structure on the same weights: what is frozen or wrapped in it stays its own.

    Raises:
        SubspaceError: see `check_unadapted`.
    """
    check_unadapted(model)
    shared: dict[int, Any] = {}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter
        # of other kinds, such as bitsandbytes', more than the data belongs to it
        shared[id(parameter)] = nn.Parameter(parameter.data, parameter.requires_grad) if plain else parameter
    for buffer in model.buffers():
        # what a forward pass may count, such as means of a batch norm, is no part of the frozen weights
        counts = buffer.is_floating_point() or not buffer.ndim
        shared[id(buffer)] = buffer.detach().clone() if counts else buffer
    return copy.deepcopy(model, shared)


def largest_change(before: torch.Tensor, after: torch.Tensor) -> float:
    """Return the largest absolute change of logits; infinite where their numbers differ."""
    if before.shape != after.shape or not before.numel():
        return math.inf
    return float((before - after).abs().max())
