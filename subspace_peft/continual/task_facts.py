"""What a journal says of a task before it is learned, and the checks of calls for tasks that it knows already."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .._io.digest import file_sha256
from ..errors import SubspaceError
from .arguments import check_judged, recorded
from .data import Facts, check, check_head, check_labels, facts_of, names_of_labels
from .journal import changes
from .training import TaskData, Workshop, outputs_of

SOURCES = ("data", "lora")


def facts_of_task(data: TaskData, labels: Sequence[str] | None, shop: Workshop, *, shown: bool) -> dict[str, Any]:
    """Check a task's data, and return what the journal records of them, as JSON values.

    Args:
        data: the task.
        labels: names of its labels, where they were given.
        shop: what trains it.
        shown: show a bar where reading takes long.

    Raises:
        SubspaceError: data are missing or empty, or labels do not fit one another or the classifier.
    """
    name = data.name
    if data.train is not None and data.lora is not None:
        raise SubspaceError(f"Task {name!r}: give train_dataset= or lora=, not both.")
    if data.lora is None:
        check(data.train, name, "training")
    check(data.evaluation, name, "evaluation")
    if data.train is not None and shop.train is None:
        check_judged(name, data.args, data.validation)
    given = {"training": data.train, "evaluation": data.evaluation, "validation": data.validation}
    given = {what: each for what, each in given.items() if each is not None}
    found: dict[str, Facts] = {what: facts_of(each, name, what, shown=shown) for what, each in given.items()}
    known = {what: names_of_labels(each) for what, each in given.items()}
    own = list(labels) if labels is not None else next((each for each in known.values() if each is not None), None)
    check_labels(name, own, known)
    shop.facts[name] = list(found.values())
    if isinstance(shop.model, nn.Module):
        for each in found.values():
            check_head(name, each, outputs_of(shop.model))
    return {
        "data": {what: {"sha256": each.sha256, "examples": each.count} for what, each in found.items()},
        "labels": own,
        "lora": None if data.lora is None else _digest_of_lora(data.lora),
        "training": recorded(data.args) if data.train is not None and shop.train is None else None,
    }


def check_learned(entry: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Check that a task that is learned is called for with what it was learned from; other arguments are warned of.

    Args:
        entry: the journal's.
        facts: of the call, see `facts_of_task`.

    Raises:
        SubspaceError: its data or its labels are others.
    """
    name = entry["name"]
    if entry["labels"] != facts["labels"]:
        raise SubspaceError(
            f"Task {name!r} was learned with the labels {entry['labels']}, and now has {facts['labels']}: its"
            " classifier would answer with the wrong names. Give the labels in the earlier order, or learn a task of"
            " another name."
        )
    if wrong := changes({key: entry[key] for key in SOURCES}, {key: facts[key] for key in SOURCES}):
        parts = [path.split(".") for path, _, _ in wrong]
        what = ", ".join(dict.fromkeys(part[1] if len(part) > 1 else part[0] for part in parts))
        raise SubspaceError(
            f"Task {name!r} was learned already, from other data ({what}). Learn these under another name, or leave"
            " the call out."
        )
    if wrong := changes(entry["training"] or {}, facts["training"] or {}):
        said = "; ".join(f"{path} was {old}, and is {new} now" for path, old, new in wrong)
        warnings.warn(f"Task {name!r} is learned already and stays as it is, though {said}.", stacklevel=3)


def check_begun(entry: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Check that a task that is not finished is called for with what it was begun with.

    Args:
        entry: the journal's.
        facts: of the call, see `facts_of_task`.

    Raises:
        SubspaceError: something is another; names it with both values.
    """
    keys = (*SOURCES, "labels", "training")
    if wrong := changes({key: entry[key] for key in keys}, {key: facts[key] for key in keys}):
        said = "; ".join(f"{path} was {old}, and is {new} now" for path, old, new in wrong)
        raise SubspaceError(
            f"Task {entry['name']!r} was begun with something else: {said}. Give what it was begun with, or begin it"
            " again with restart=True (--restart)."
        )


def _digest_of_lora(lora: Any) -> str:
    """Return what tells a LoRA from others: a hash of its file, or else what it is called."""
    if isinstance(lora, (str, os.PathLike)):
        file = Path(lora).expanduser() / "adapter_model.safetensors"
        if file.is_file():
            return file_sha256(file)
    return str(lora)
