"""Run a plan: its basis, its tasks in their order, and what is kept of it in the run's folder."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import glob
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, TrainingArguments
from transformers.utils import logging as transformers_logging

from .._io.progress import begin
from .._io.warn import warn_caller
from ..basis.module_store import names_of
from ..errors import BadFileError, HubUnavailableError, SubspaceError
from ..hub_requests import ask
from ..tuner import SubspaceConfig
from .arguments import check_judged, default_arguments
from .journal import Journal, changes, seed_of
from .learner import ContinualLearner
from .plan import Plan, read_kept_plan
from .status import RunStatus
from .text_tasks import TextTask, read_task
from .training import own_randomness, twin

COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
# whole numbers by default, which need not be whole
SHARES = ("num_train_epochs", "warmup_steps", "logging_steps", "save_steps", "eval_delay")


def run_plan(plan: Plan, folder: str | Path, *, restart: bool = False, progress: bool = True) -> RunStatus:
    """Learn the tasks of a plan, or go on with them.

    Args:
        plan: see `read_plan`.
        folder: the run's folder.
        restart: begin a task again that was begun with other data or arguments and is not finished, or give it up
            where the plan has it no more.
        progress: show bars.

    Returns:
        The run's state at the end.

    Raises:
        SubspaceError: something in the plan is wrong, or is not what the run began with; names it.
        OSError: the disk refuses.
    """
    root = Path(folder).expanduser()
    journal = Journal.read(root)
    known = [task.name for task in plan.tasks]
    given_up = None if journal is None else _check_tasks(plan, root, journal, known, restart)
    if journal is not None:
        _check_kept(plan, root)
    tokenizer = _load(plan, "tokenizer", lambda: AutoTokenizer.from_pretrained(plan.base_model))
    # all data are read before the first task is learned: what is wrong with the last one shows now
    tasks = {task.name: read_task(plan, task, tokenizer) for task in plan.tasks}
    args = {task.name: _arguments(plan, task.training, root) for task in plan.tasks}
    for name, task in tasks.items():
        if task.train is not None:
            check_judged(name, args[name], task.validation)
    config = _config(plan)
    model = _Classifiers(plan, tasks)
    basis = plan.basis or (_built(plan, root, progress) if journal is None else None)
    with ContinualLearner(
        model,
        basis,
        root,
        options=plan.made_options(progress=progress),
        config=config,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    ) as learner:
        plan.save(root)
        if given_up is not None:
            learner.drop(given_up)
        # those that were begun first: what is learned is needed for the scores of the others
        begun = [] if journal is None else [each["name"] for each in journal.tasks if each["name"] != given_up]
        for name in [*begun, *(name for name in known if name not in begun)]:
            task = tasks[name]
            learner.learn(
                name,
                task.train,
                task.test,
                validation_dataset=task.validation,
                lora=task.plan.lora,
                labels=task.labels,
                compute_metrics=task.score(),
                metric=task.plan.metric,
                args=args[name],
                restart=restart,
            )
        return learner.status


def _check_tasks(plan: Plan, root: Path, journal: Journal, known: list[str], restart: bool) -> str | None:
    """Check that a run's tasks are in the plan; return the unfinished one that is to be given up, if any."""
    gone = [each["name"] for each in journal.tasks if each["name"] not in known]
    if learned := [name for name in gone if name in journal.learned()]:
        raise SubspaceError(
            f"{plan.place}: tasks: {learned[0]!r} was learned in {root} and is not in the plan any more; all tasks are"
            " scored after each. Put it back, or begin in another folder."
        )
    if gone and not restart:
        raise SubspaceError(
            f"{plan.place}: tasks: {gone[0]!r} was begun in {root} and is not finished, and is not in the plan any"
            " more. Put it back, or give it up with restart=True (--restart)."
        )
    return gone[0] if gone else None


def _check_kept(plan: Plan, root: Path) -> None:
    """Hold a plan against the one that the run has kept, by what neither the journal nor the data tell."""
    try:
        kept = read_kept_plan(root)
    except BadFileError:
        raise
    except SubspaceError:
        return  # a run of Python, or one that was interrupted before the plan was kept
    keys = ("base_model", "loras", "build") if kept.basis is None and plan.basis is None else ("base_model",)
    wrong = changes({key: getattr(kept, key) for key in keys}, {key: getattr(plan, key) for key in keys})
    # what was moved has another place; its weights are held against those of the first training as a task is loaded
    moved = {key for key in ("base_model", "loras") if all(map(_is_gone, _listed(getattr(kept, key))))}
    wrong = [each for each in wrong if each[0] not in moved]
    if kept.basis is None and plan.basis is not None:
        wrong = [("basis", "built from `loras:`", json.dumps(plan.basis))]
    if wrong:
        said = "; ".join(f"{name} was {old}, and is {new} now" for name, old, new in wrong)
        raise SubspaceError(
            f"{plan.place}: the run in {root} began with another plan: {said}. Go on with the earlier one, or begin in"
            " another folder."
        )


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _is_gone(place: str) -> bool:
    """Return whether an absolute path, or pattern of paths, leads nowhere."""
    return Path(place).is_absolute() and not glob.glob(place)


class _Classifiers:
    """Gives a fresh classifier for a task; those with as many labels share their weights in memory."""

    def __init__(self, plan: Plan, tasks: Mapping[str, TextTask]) -> None:
        self.plan, self.tasks = plan, tasks
        self.made: dict[int, nn.Module] = {}

    def __call__(self, name: str) -> nn.Module:
        labels = self.tasks[name].labels
        if len(labels) not in self.made:
            begin(f"loading the base model {self.plan.base_model}")
            seed = int(self.plan.options.get("seed", 0))
            # its head is new, also where the base model has one for other labels, and the same in every process
            with own_randomness(seed_of(seed, "classifier", str(len(labels)))):
                made = _load(self.plan, "classifier", lambda: _under_new_head(self.plan, len(labels)))
            self.made[len(labels)] = made
        model = twin(self.made[len(labels)])
        model.config = copy.deepcopy(model.config)
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: i for i, label in enumerate(labels)}
        return model


def _under_new_head(plan: Plan, count: int) -> nn.Module:
    """Return the base model as a classifier of `count` labels; warn of what it lacks below its head."""
    said = transformers_logging.get_verbosity()
    # it reports a head of another size or task, which is meant to be new
    transformers_logging.set_verbosity_error()
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            plan.base_model, num_labels=count, ignore_mismatched_sizes=True, output_loading_info=True
        )
    finally:
        transformers_logging.set_verbosity(said)
    own = [*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]
    inner = f"{model.base_model_prefix}."
    # the pooler belongs to the head: models that were trained without one have none
    lacking = sorted(key for key in own if key.startswith(inner) and ".pooler." not in f".{key}")
    if lacking:
        warn_caller(
            f"{plan.place}: base_model: {plan.base_model} lacks {names_of(lacking, 3)} of a"
            f" {type(model).__name__}, which begin at random. Name a model whose encoder is whole."
        )
    return model


def _load(plan: Plan, what: str, load: Any) -> Any:
    try:
        return ask(plan.base_model, load)
    except HubUnavailableError:
        raise
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())[:300]
        raise SubspaceError(
            f"{plan.place}: base_model: no {what} can be loaded from {plan.base_model} ({said})."
        ) from error


def _built(plan: Plan, root: Path, progress: bool) -> Any:
    """Build the first basis of a plan."""
    from ..builders import BuildOptions, build_basis

    _check_names(plan, "build", plan.build, BuildOptions.names())
    try:
        return build_basis(plan.loras, options=BuildOptions(**plan.build), progress=progress)
    except SubspaceError as error:
        raise SubspaceError(f"{plan.place}: loras: {error}") from error


def _config(plan: Plan) -> SubspaceConfig:
    names = [each.name for each in dataclasses.fields(SubspaceConfig) if each.init]
    _check_names(plan, "config", plan.config, names)
    for name in ("basis", "extra_rank"):
        if name in plan.config:
            raise SubspaceError(f"{plan.place}: config: {name} is set for each task by the run. Leave it out.")
    try:
        return SubspaceConfig(**{"task_type": "SEQ_CLS", **plan.config})
    except SubspaceError as error:
        raise SubspaceError(f"{plan.place}: config: {error}") from error


def _arguments(plan: Plan, own: Mapping[str, Any], root: Path) -> TrainingArguments:
    """Return the arguments of a task's training: the usual ones, those of the plan, and the task's own."""
    given = {**plan.training, **own}
    _check_names(plan, "training", given, [each.name for each in dataclasses.fields(TrainingArguments) if each.init])
    usual = default_arguments(root / "work")
    for name, value in given.items():
        if wrong := _wrong_kind(name, value, getattr(usual, name)):
            raise SubspaceError(f"{plan.place}: training: {name}: {value!r}: {wrong}.")
    kept = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "save_strategy", "save_total_limit")
    values = {name: getattr(usual, name) for name in (*kept, "report_to", "dataloader_pin_memory")}
    try:
        return TrainingArguments(str(root / "work"), **{**values, **given})
    except (ValueError, TypeError, ImportError) as error:
        raise SubspaceError(f"{plan.place}: training: {' '.join(str(error).split())}") from error


def _wrong_kind(name: str, value: Any, usual: Any) -> str | None:
    """Return what to give in the place of a training's argument that is not of the usual one's kind, or None.

    TrainingArguments take anything, and what is wrong shows when a task was begun.
    """
    if isinstance(usual, bool):
        return None if isinstance(value, bool) else "give true or false"
    if isinstance(usual, float) or (isinstance(usual, int) and name in SHARES):
        return None if isinstance(value, (int, float)) and not isinstance(value, bool) else "give a number"
    if isinstance(usual, int) and (not isinstance(value, int) or isinstance(value, bool)):
        return "give a whole number"
    if name in COUNTS and value < 1:
        return "give 1 or more"
    return None


def _check_names(plan: Plan, key: str, given: Mapping[str, Any], known: list[str]) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise SubspaceError(f"{plan.place}: {key}: there is no {name!r}.{meant}")
