"""The data of a task: what tells it from other data, which labels it has, and parts of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets.fingerprint import Hasher

from .._io.progress import progress_bar
from ..errors import SubspaceError

LABELS = ("labels", "label")  # the columns that the Trainer takes for labels


@dataclass(frozen=True)
class Facts:
    """What is recorded of a data set.

    Attributes:
        sha256: over all examples; hex.
        count: how many examples.
        largest: the largest whole-number label, None where the examples have none.
        smallest: the smallest one.
        fraction: a label that is a number, and no whole one, None where there is none.
    """

    sha256: str
    count: int
    largest: int | None
    smallest: int | None = None
    fraction: float | None = None


def check(dataset: Any, task: str, what: str) -> None:
    """Check that a data set can be used: it has a length, examples by number, and at least one of them.

    Raises:
        SubspaceError: it is missing, empty or of another kind; names the task.
    """
    if dataset is None:
        raise SubspaceError(
            f"Task {task!r} has no {what} data. Give {'them' if what != 'evaluation' else 'a set to evaluate on'} as"
            f" {'train_dataset' if what == 'training' else 'eval_dataset'}."
        )
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise SubspaceError(
            f"Task {task!r}: its {what} data are a {type(dataset).__name__}, which has no length or no examples by"
            " number. Give a data set that has both, so that an interrupted training finds its place again."
        )
    if len(dataset) == 0:
        raise SubspaceError(f"Task {task!r}: its {what} data are empty. Give at least one example.")


def facts_of(dataset: Any, task: str, what: str, *, shown: bool) -> Facts:
    """Return what is recorded of a data set, from all of its examples as they are stored, transforms aside.

    Args:
        dataset: any data set with a length and examples by number.
        task: the task's name, for messages.
        what: which of its data they are, for messages.
        shown: show a bar where this takes long.
    """
    check(dataset, task, what)
    plain = dataset.with_format(None) if hasattr(dataset, "with_format") else dataset
    digest, found, fraction = hashlib.sha256(), set(), None
    for i in progress_bar(range(len(plain)), desc=f"reading {task}", unit="example", shown=shown):
        row = plain[i]
        _feed(digest, row)
        if isinstance(row, Mapping):
            value = next((_scalar(row[key]) for key in LABELS if key in row), None)
            if isinstance(value, int) and not isinstance(value, bool):
                found.add(value)
            elif isinstance(value, float) and not value.is_integer():
                fraction = value
    return Facts(digest.hexdigest(), len(plain), max(found, default=None), min(found, default=None), fraction)


def names_of_labels(dataset: Any) -> list[str] | None:
    """Return the names of the labels by number as a `datasets.Dataset` records them; None where it does not."""
    features = getattr(dataset, "features", None)
    if not isinstance(features, Mapping):
        return None
    for key in LABELS:
        names = getattr(features.get(key), "names", None)
        if names:
            return [str(name) for name in names]
    return None


def check_labels(task: str, labels: Sequence[str] | None, others: Mapping[str, Sequence[str] | None]) -> None:
    """Check that all data of a task number its labels alike.

    Args:
        task: the task's name.
        labels: those of its training data, or those that were given.
        others: which data → their labels, where they say so.

    Raises:
        SubspaceError: they do not; shows both.
    """
    for what, found in others.items():
        if labels is not None and found is not None and list(found) != list(labels):
            raise SubspaceError(
                f"Task {task!r}: its {what} data number the labels {_listed(found)}, its training data"
                f" {_listed(labels)}. Cast the column to one ClassLabel in both."
            )


def check_labelled(task: str, what: str, dataset: Any, names: Sequence[str]) -> None:
    """Check that examples have what a model calls labels: without them it returns no loss, and nothing is scored.

    Args:
        task: the task's name.
        what: which of its data they are.
        dataset: the data.
        names: what the model calls labels; empty where its arguments do not tell.

    Raises:
        SubspaceError: the first example has none of these.
    """
    row = dataset[0]
    if names and isinstance(row, Mapping) and not {*names, *LABELS, "label_ids"} & row.keys():
        raise SubspaceError(
            f"Task {task!r}: its {what} data have no labels: an example has {', '.join(map(str, row))}, and its model"
            f" takes them as {' or '.join(names)}. Name the column so, or give a data_collator= that makes them."
        )


def check_head(task: str, facts: Facts, outputs: int | None) -> None:
    """Check that a classifier has an output for every label.

    Args:
        task: the task's name.
        facts: of its data.
        outputs: the classifier's outputs; None of other models.

    Raises:
        SubspaceError: it has fewer.
    """
    # a single output is a regression's
    if outputs is not None and outputs > 1 and facts.fraction is not None:
        raise SubspaceError(
            f"Task {task!r}: its data have the label {facts.fraction}, and the model's classifier {outputs} outputs,"
            " one for each label. Give whole numbers as labels, or, to predict a number, a model of one output"
            " (num_labels=1) and compute_metrics=."
        )
    if outputs is not None and outputs > 1 and facts.smallest is not None and facts.smallest < 0:
        raise SubspaceError(
            f"Task {task!r}: its data have the label {facts.smallest}, and labels are counted from 0. Choose a split"
            " that has labels, or number them from 0."
        )
    if outputs is not None and outputs > 1 and facts.largest is not None and facts.largest >= outputs:
        raise SubspaceError(
            f"Task {task!r} has labels up to {facts.largest}, and the model's classifier {outputs} outputs. Give a"
            " function that returns a base model with as many outputs as the task has labels:"
            " `lambda task: AutoModelForSequenceClassification.from_pretrained(base, num_labels=n[task])`."
        )


def part(dataset: Any, indices: Sequence[int]) -> Any:
    """Return the examples of a data set at some places."""
    if hasattr(dataset, "select"):
        return dataset.select(indices)
    from torch.utils.data import Subset

    return Subset(dataset, list(indices))


def held_out(dataset: Any, share: float, seed: int, task: str) -> tuple[Any, Any]:
    """Split training data for a probe: return what it trains on, and what it is judged by.

    Args:
        dataset: the training data.
        share: which share is held out.
        seed: of the choice.
        task: the task's name, for messages.

    Raises:
        SubspaceError: there are too few examples for both.
    """
    import torch

    count = max(1, round(share * len(dataset)))
    if count >= len(dataset):
        raise SubspaceError(
            f"Task {task!r} has {len(dataset)} training examples: too few to hold some out for a probe. Give"
            " validation_dataset=, or decide beforehand with probe='always' or probe='never'."
        )
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    return part(dataset, sorted(order[count:])), part(dataset, sorted(order[:count]))


def _feed(digest: Any, value: Any) -> None:
    """Add a value to a digest, the same in every process."""
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"{key}:".encode("utf-8", "surrogateescape"))
            _feed(digest, value[key])
        digest.update(b"}")
        return
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float().numpy() if str(value.dtype) == "torch.bfloat16" else value.numpy()
    if hasattr(value, "tobytes") and hasattr(value, "shape"):
        digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
        return
    try:
        digest.update(json.dumps(value, sort_keys=True).encode() + b",")
    except (TypeError, ValueError):
        if isinstance(value, (list, tuple)):
            for each in value:
                _feed(digest, each)
            digest.update(b"]")
        else:
            digest.update(Hasher.hash(value).encode())


def _scalar(value: Any) -> Any:
    """Return a value, of an array or tensor without axes as a number of Python."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def _listed(labels: Sequence[str]) -> str:
    shown = ", ".join(f"{i} {name!r}" for i, name in enumerate(labels[:6]))
    return f"{shown}{' …' if len(labels) > 6 else ''}"
