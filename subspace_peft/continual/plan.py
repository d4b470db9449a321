"""A run written down in a file: base model, basis, options, and the list of tasks. Importing needs no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .._io.atomic import write_text_aside
from .._io.settings_file import check_keys, read_settings
from .._io.untrusted import read_json
from ..errors import BadFileError, SubspaceError
from .options import ContinualOptions
from .store import NAME

PLAN_FILE = "plan.json"
REMEDY = "Give a YAML or JSON file with `base_model:`, `basis:` or `loras:`, and `tasks:`."
KEYS = ("base_model", "basis", "loras", "build", "out", "options", "training", "config", "max_length", "tasks")
METRICS = ("accuracy", "f1", "matthews")
SPLITS = ("train", "validation", "test")
# set by the learner, or without a meaning for a task among many
NOT_TRAINING = ("output_dir", "seed", "data_seed", "push_to_hub", "hub_model_id", "resume_from_checkpoint")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True)
class TaskPlan:
    """A task of a plan.

    Attributes:
        name: its name.
        data: a file or folder, a data set's id on the Hub, or a mapping of ``train``, ``validation`` and ``test`` to
            files.
        subset: of a data set on the Hub: its configuration.
        text: the text's column, or two columns of a pair.
        label: the label's column.
        train: the split to train on.
        validation: the split that a probe is judged by; None: part of the training split.
        test: the split that its score is measured on.
        labels: names of the labels in their order; None: those that the data set records, or the values found, sorted.
        metric: ``accuracy``, ``f1`` (the mean over labels) or ``matthews``.
        lora: a LoRA to project instead of training.
        limit: most training examples, the first ones; None: all.
        training: arguments of its training that differ from the plan's.
    """

    name: str
    data: Any
    subset: str | None = None
    text: Any = "text"
    label: str = "label"
    train: str = "train"
    validation: str | None = None
    test: str = "test"
    labels: list[str] | None = None
    metric: str = "accuracy"
    lora: str | None = None
    limit: int | None = None
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A run as a file describes it, with places as they were found.

    Attributes:
        place: the file.
        base_model: id or folder of the base model.
        basis: id or folder of the first basis; None where it is built.
        loras: the LoRAs that the first basis is built from, where none is given.
        build: options of that build.
        out: the run's folder, if the file names one.
        options: options of the run.
        training: TrainingArguments.
        config: fields of `SubspaceConfig`.
        max_length: most tokens of an example; None: the tokenizer's own limit.
        tasks: the tasks in their order.
    """

    place: str
    base_model: str
    basis: str | None
    loras: list[str]
    build: dict[str, Any]
    out: str | None
    options: dict[str, Any]
    training: dict[str, Any]
    config: dict[str, Any]
    max_length: int | None
    tasks: list[TaskPlan]

    def made_options(self, **more: Any) -> ContinualOptions:
        """Return the run's options; `more` are those that are no part of the file."""
        return ContinualOptions(**self.options, **more)

    def save(self, folder: Path) -> None:
        """Keep the plan in the run's folder, from where `read_kept_plan` reads it."""
        write_text_aside(folder / PLAN_FILE, json.dumps(asdict(self), indent=1) + "\n")


def read_plan(place: str | Path) -> Plan:
    """Read a plan. Paths in it are looked for beside the file first, then from the working directory.

    Args:
        place: a YAML or JSON file.

    Raises:
        SubspaceError: it cannot be read, or something in it is wrong; names the key.
    """
    file = Path(place).expanduser()
    given = read_settings(file, "plan", REMEDY)
    check_keys(file, given, KEYS)
    if not given.get("base_model"):
        raise SubspaceError(f"{file}: base_model: give the base model's folder or Hub id.")
    loras = given.get("loras") or []
    loras = [loras] if isinstance(loras, str) else loras
    if not _are_texts(loras):
        raise SubspaceError(f"{file}: loras: {loras!r}: give a list of folders and Hub ids.")
    if bool(given.get("basis")) == bool(loras):
        raise SubspaceError(f"{file}: give either `basis:`, or `loras:` to build one from.")
    if given.get("build") and not loras:
        raise SubspaceError(f"{file}: build: its options are for a basis that is built from `loras:`. Leave it out.")
    for key in ("base_model", "basis", "out"):
        if given.get(key) is not None and not isinstance(given[key], str):
            raise SubspaceError(f"{file}: {key}: {given[key]!r}: give a folder or a Hub id.")
    length = given.get("max_length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise SubspaceError(f"{file}: max_length: {length!r}: give a number of tokens, 1 or more.")
    plan = Plan(
        place=str(file),
        base_model=_beside(file, given["base_model"]),
        basis=None if loras else _beside(file, given["basis"]),
        loras=[_beside(file, each) for each in loras],
        build=_mapping(file, given, "build"),
        out=given.get("out"),
        options=_options(file, _mapping(file, given, "options")),
        training=_training(file, "training", _mapping(file, given, "training")),
        config=_mapping(file, given, "config"),
        max_length=length,
        tasks=_tasks(file, given.get("tasks")),
    )
    return plan


def read_kept_plan(folder: str | Path) -> Plan:
    """Read the plan that a run's folder has kept.

    Raises:
        SubspaceError: the folder has none.
        BadFileError: it is damaged.
    """
    file = Path(folder).expanduser() / PLAN_FILE
    if not file.is_file():
        raise SubspaceError(
            f"{file.parent} holds no run of a plan: there is no {PLAN_FILE}. Give the folder that"
            " `subspace-peft continual run` wrote; a run of Python goes on with the same calls in Python."
        )
    try:
        values = read_json(file)
        values["tasks"] = [TaskPlan(**each) for each in values["tasks"]]
        return Plan(**values)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadFileError(
            f"{file}: no plan can be read from it ({error}). Give `run` the plan's own file."
        ) from error


def _tasks(file: Path, listed: Any) -> list[TaskPlan]:
    if not isinstance(listed, list) or not listed:
        raise SubspaceError(f"{file}: tasks: give a list of tasks, each with `name:` and `data:`.")
    found = [_task(file, entry, place) for place, entry in enumerate(listed, start=1)]
    names = [task.name for task in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise SubspaceError(f"{file}: tasks: {twice[0]!r} comes twice. Name the tasks apart.")
    return found


def _task(file: Path, entry: Any, place: int) -> TaskPlan:
    if not isinstance(entry, Mapping):
        raise SubspaceError(f"{file}: tasks: {entry!r}: give a mapping with `name:` and `data:`.")
    name = entry.get("name")
    where = f"{file}: task {name if name is not None else place}"
    check_keys(where, entry, [each.name for each in fields(TaskPlan)])
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise SubspaceError(
            f"{where}: name: {name!r}: give up to 64 letters, digits, '.', '_' and '-', beginning with a letter or"
            " digit."
        )
    data = entry.get("data")
    if isinstance(data, Mapping):
        check_keys(f"{where}: data", data, SPLITS)
        if not data or not _are_texts(list(data.values())):
            raise SubspaceError(f"{where}: data: give a file for each of {', '.join(SPLITS)}.")
        data = {split: _beside(file, each) for split, each in data.items()}
    elif isinstance(data, str) and data:
        data = _beside(file, data)
    else:
        raise SubspaceError(f"{where}: data: {data!r}: give a file, a folder, a data set's id, or files by split.")
    text = entry.get("text", "text")
    if not (isinstance(text, str) or (_are_texts(text) and len(text) in (1, 2))):
        raise SubspaceError(f"{where}: text: {text!r}: give a column, or a list of the two columns of a pair.")
    labels = entry.get("labels")
    if labels is not None and not (isinstance(labels, list) and len(labels) > 1):
        raise SubspaceError(f"{where}: labels: {labels!r}: give a list of at least two names, in their order.")
    for key in ("subset", "label", "train", "validation", "test", "lora"):
        if entry.get(key) is not None and not isinstance(entry[key], str):
            raise SubspaceError(f"{where}: {key}: {entry[key]!r}: give a text.")
    if entry.get("metric", "accuracy") not in METRICS:
        raise SubspaceError(f"{where}: metric: {entry['metric']!r}: choose one of {', '.join(METRICS)}.")
    limit = entry.get("limit")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise SubspaceError(f"{where}: limit: {limit!r}: give a number of examples, 1 or more.")
    more = {key: value for key, value in entry.items() if value is not None}
    more |= {"data": data, "training": _training(file, f"task {name}: training", _mapping(where, entry, "training"))}
    if "labels" in more:
        more["labels"] = [str(each) for each in more["labels"]]
    if "lora" in more:
        more["lora"] = _beside(file, more["lora"])
    return TaskPlan(**more)


def _options(file: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    check_keys(f"{file}: options", given, [name for name in ContinualOptions.names() if name != "progress"])
    values = {name: _number(value) for name, value in given.items()}
    try:
        ContinualOptions(**values)
    except SubspaceError as error:
        # as it is written in the file
        said = re.sub(
            r"\b([a-z_]+)=(?=\S)", lambda found: f"{found[1]}: " if found[1] in values else found[0], str(error)
        )
        raise SubspaceError(f"{file}: options: {said}") from error
    return values


def _training(file: Path, where: str, given: Mapping[str, Any]) -> dict[str, Any]:
    for name in given:
        if name in NOT_TRAINING:
            raise SubspaceError(f"{file}: {where}: {name} is set for each task by the run. Leave it out.")
    # YAML takes 3e-3 for a text
    return {name: _number(value) for name, value in given.items()}


def _number(value: Any) -> Any:
    """Return a text that is a number as one: YAML's own numbers need a point in 3.0e-3."""
    if not isinstance(value, str) or not NUMBER.fullmatch(value):
        return value
    number = float(value)
    return int(value) if re.fullmatch(r"[-+]?\d+", value) else number


def _mapping(file: Any, given: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = given.get(key) or {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise SubspaceError(f"{file}: {key}: {value!r}: give names with values.")
    return dict(value)


def _are_texts(values: Any) -> bool:
    return (
        isinstance(values, Sequence) and not isinstance(values, str) and all(isinstance(e, str) and e for e in values)
    )


def _beside(file: Path, text: str) -> str:
    """Return the absolute path of what lies beside the file or in the working directory, else the text as it is."""
    for place in (file.parent / text, Path(text).expanduser()):
        if place.exists():
            return str(place.absolute())
        if any(each in text for each in "*?[") and any(place.parent.glob(place.name)):
            return str(place.absolute())
    return text
