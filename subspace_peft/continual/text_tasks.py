"""Text classification for a plan: data from files or the Hub, tokenized, a classifier for each task, and its score."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._io.progress import begin
from ..errors import SubspaceError
from .plan import Plan, TaskPlan

KINDS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
OTHER_LABELS = "List all labels as `labels:`, in their order, or choose another column as `label:`."


@dataclass(frozen=True)
class TextTask:
    """A task's data, ready for the Trainer.

    Attributes:
        plan: the task in its plan.
        labels: names of its labels, by number.
        train: tokenized training examples; None where it comes from a LoRA.
        validation: tokenized examples for the probe, or None.
        test: tokenized examples for its score.
    """

    plan: TaskPlan
    labels: list[str]
    train: Any
    validation: Any
    test: Any

    def score(self) -> Callable[[Any], dict[str, float]]:
        """Return the function that the Trainer computes the task's metric by."""
        compute = SCORES[self.plan.metric]

        def metrics(answers: Any) -> dict[str, float]:
            logits = answers.predictions[0] if isinstance(answers.predictions, tuple) else answers.predictions
            found, right = np.asarray(logits).argmax(-1), np.asarray(answers.label_ids)
            return {self.plan.metric: compute(found, right, len(self.labels))}

        return metrics


def read_task(plan: Plan, task: TaskPlan, tokenizer: Any) -> TextTask:
    """Read a task's data and tokenize them.

    Args:
        plan: the plan.
        task: one of its tasks.
        tokenizer: the base model's.

    Raises:
        SubspaceError: data, a split or a column are missing; labels are missing or unknown; names them.
        ImportError: the package datasets is missing.
    """
    begin(f"reading the data of {task.name}")
    where = f"{plan.place}: task {task.name}"
    splits = _splits(where, task)
    wanted = {} if task.lora is not None else {"train": task.train}
    wanted |= {} if task.validation is None else {"validation": task.validation}
    wanted["test"] = task.test
    for key, split in wanted.items():
        if split not in splits:
            remedy = (
                " Name one of these as `test:`, or add a file of examples to score it by." if key == "test" else ""
            )
            raise SubspaceError(f"{where}: {key}: there is no split {split!r}; there are {', '.join(splits)}.{remedy}")
    # a LoRA has no record of its labels: those of the data that it may have been trained on are the most complete
    named_by = splits.get(task.train)
    labels = _labels(where, task, named_by if named_by is not None and len(named_by) else splits[task.test])
    made = {key: _prepared(where, plan, task, key, splits[split], labels, tokenizer) for key, split in wanted.items()}
    return TextTask(task, labels, made.get("train"), made.get("validation"), made["test"])


def _splits(where: str, task: TaskPlan) -> Mapping[str, Any]:
    try:
        import datasets
    except ImportError:
        raise ImportError("The tasks of a plan are read by datasets: pip install datasets.") from None
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        if isinstance(task.data, Mapping):
            return {split: _file(where, datasets, file)["train"] for split, file in task.data.items()}
        place = Path(task.data)
        if place.is_file():
            return dict(_file(where, datasets, task.data))
        if not place.exists() and (place.suffix in KINDS or task.data.startswith((".", "/", "~"))):
            raise SubspaceError(f"{where}: data: there is no {task.data}, neither beside the plan nor from here.")
        if place.is_dir() and (place / "dataset_dict.json").is_file():
            return dict(datasets.load_from_disk(str(place)))
        return dict(datasets.load_dataset(task.data, task.subset))
    except SubspaceError:
        raise
    except Exception as error:  # of many libraries
        said = " ".join(str(error).split())[:300]
        raise SubspaceError(
            f"{where}: data: {task.data} cannot be read ({type(error).__name__}: {said}). Give CSV, JSON or Parquet"
            " files, a folder of them, or a data set's id on the Hub."
        ) from error
    finally:
        if shown:
            enable_progress_bar()


def _file(where: str, datasets: Any, file: str) -> Mapping[str, Any]:
    place = Path(file)
    if not place.is_file():
        raise SubspaceError(f"{where}: data: there is no file {file}, neither beside the plan nor from here.")
    kind = KINDS.get(place.suffix.lower())
    if kind is None:
        raise SubspaceError(f"{where}: data: {file}: its ending is none of {', '.join(KINDS)}.")
    more = {"delimiter": "\t", "quoting": csv.QUOTE_MINIMAL} if place.suffix.lower() == ".tsv" else {}
    try:
        return datasets.load_dataset(kind, data_files=str(place), **more)
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise SubspaceError(f"{where}: data: {file} has no examples. Give a file that has some.") from error


def _labels(where: str, task: TaskPlan, data: Any) -> list[str]:
    """Return the names of a task's labels by number."""
    _check_columns(where, task, data)
    labels = task.labels or _labels_of(where, task, data)
    if len(labels) == 1 and len(data):
        # a classifier of one output would be trained as a regression, and be right about everything
        raise SubspaceError(
            f"{where}: label: all of {len(data)} examples have the label {labels[0]!r} in the column {task.label!r}:"
            f" there is nothing to tell apart. {OTHER_LABELS}"
        )
    return labels


def _labels_of(where: str, task: TaskPlan, data: Any) -> list[str]:
    """Return the names of the labels that data record, or else of those that they have, sorted."""
    if named := getattr(data.features[task.label], "names", None):
        return [str(each) for each in named]
    values = sorted(set(data[task.label]), key=lambda value: (str(type(value)), value))
    if odd := [value for value in values if value is None or isinstance(value, float)]:
        raise SubspaceError(
            f"{where}: label: the column {task.label!r} holds {odd[0]!r}. Give a column of labels, whole numbers or"
            " texts; a number to be predicted is none."
        )
    if all(isinstance(value, int) for value in values):
        if values and min(values) < 0:
            return [str(value) for value in values]
        count = max(values, default=0) + 1
        if count > max(2, len(data)):
            raise SubspaceError(
                f"{where}: label: by the numbers in the column {task.label!r}, up to {count - 1}, there are {count}"
                f" labels, and only {len(data)} examples. {OTHER_LABELS}"
            )
        return [str(value) for value in range(count)]
    return [str(value) for value in values]


def _check_columns(where: str, task: TaskPlan, data: Any) -> None:
    for key, names in (("text", [task.text] if isinstance(task.text, str) else task.text), ("label", [task.label])):
        for name in names:
            if name not in data.column_names:
                raise SubspaceError(
                    f"{where}: {key}: there is no column {name!r}; there are {', '.join(data.column_names)}."
                )


def _prepared(where: str, plan: Plan, task: TaskPlan, key: str, data: Any, labels: list[str], tokenizer: Any) -> Any:
    """Return a split's examples, tokenized, with labels by number."""
    _check_columns(where, task, data)
    if key == "train" and task.limit is not None:
        data = data.select(range(min(task.limit, len(data))))
    if not len(data):
        raise SubspaceError(f"{where}: {key}: the split has no examples.")
    known = {name: i for i, name in enumerate(labels)}
    named = getattr(data.features[task.label], "names", None)
    # a whole number stands for a place among the labels, where they are no numbers themselves
    by_place = not any(name.lstrip("-").isdecimal() for name in labels)

    def number(value: Any) -> int:
        if named and isinstance(value, int) and 0 <= value < len(named):
            value = named[value] if named[value] in known else value
        elif isinstance(value, bool) and str(value) not in known and not by_place:
            value = int(value)
        elif isinstance(value, int) and by_place and 0 <= int(value) < len(labels) and str(value) not in known:
            return int(value)
        found = known.get(str(value))
        if found is None:
            raise SubspaceError(
                f"{where}: {key}: the label {value!r} is none of {', '.join(labels)}. List all of them as `labels:`,"
                " or choose a split that has labels."
            )
        return found

    columns = [task.text] if isinstance(task.text, str) else list(task.text)
    numbers = [number(value) for value in data[task.label]]
    texts = [_texts(f"{where}: {key}", column, data[column]) for column in columns]
    tokens = tokenizer(*texts, truncation=True, max_length=plan.max_length)
    from datasets import Dataset

    return Dataset.from_dict({**tokens, "labels": numbers})


def _texts(where: str, column: str, values: Any) -> list[str]:
    """Return a column's texts; one that is missing is none that a model could read."""
    found = list(values)
    missing = [place for place, value in enumerate(found) if value is None]
    if missing:
        raise SubspaceError(
            f"{where}: text: {len(missing)} of {len(found)} examples have nothing in the column {column!r}, the first"
            f" of them number {missing[0] + 1}. Fill these in or take them out."
        )
    return [str(value) for value in found]


def accuracy(found: Any, right: Any, count: int) -> float:
    """Return the share of right answers."""
    return float((found == right).mean())


def f1(found: Any, right: Any, count: int) -> float:
    """Return the mean over labels of ``2 tp / (2 tp + fp + fn)``; a label that is nowhere counts for nothing."""
    values = []
    for label in range(count):
        hit = float(((found == label) & (right == label)).sum())
        all_of_it = float((found == label).sum() + (right == label).sum())
        if all_of_it:
            values.append(2 * hit / all_of_it)
    return sum(values) / len(values)


def matthews(found: Any, right: Any, count: int) -> float:
    """Return Matthews' correlation of answers and labels, of any number of labels; 0 where one side is constant."""
    table = np.zeros((count, count))
    np.add.at(table, (right, found), 1)
    total, hits = table.sum(), np.trace(table)
    said, true = table.sum(0), table.sum(1)
    spread = (total**2 - (said**2).sum()) * (total**2 - (true**2).sum())
    return float((hits * total - said @ true) / np.sqrt(spread)) if spread > 0 else 0.0


SCORES = {"accuracy": accuracy, "f1": f1, "matthews": matthews}
