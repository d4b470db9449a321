"""Refuse arguments that a call would take without using them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .._io.warn import warn_caller
from ..errors import SubspaceError

HUB = ("revision", "token", "cache_dir", "subfolder", "local_files_only")


def check_hub(task: Any, hub: Mapping[str, Any]) -> None:
    """Check the arguments by which a task is fetched from the Hub.

    Args:
        task: folder or Hub id; anything else is no place, and takes none of them.
        hub: the arguments.

    Raises:
        TypeError: one is none of `HUB`.
        SubspaceError: the task is in memory, so that none has an effect.
    """
    check_known(hub, HUB)
    given = [f"{name}=" for name, value in hub.items() if value is not None]
    if given and not isinstance(task, (str, Path)):
        raise SubspaceError(f"{', '.join(given)} is of a task on the Hub, and this one is in memory: leave it out.")
    if hub.get("revision") is not None and Path(str(task)).expanduser().is_dir():
        warn_caller(f"revision={hub['revision']!r} has no effect: {task} is a folder, and is taken as it is.")


def check_known(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a `TypeError`, as Python does, where an argument is none of the known ones."""
    names = list(dict.fromkeys(known))
    for name in given:
        if name not in names:
            there = f"there are {', '.join(names)}" if names else "there is none beside the named ones"
            raise TypeError(f"got an unexpected keyword argument {name!r}; {there}")


def keywords_of(function: Callable[..., Any], *others: Callable[..., Any]) -> list[str]:
    """Return the names of the keywords that functions name."""
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [
        name
        for each in (function, *others)
        for name, parameter in inspect.signature(each).parameters.items()
        if parameter.kind in kinds and name != "self"
    ]
