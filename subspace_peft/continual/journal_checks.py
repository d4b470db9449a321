"""What a journal has to say for a run to be read from it, checked before any of it is used; without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .options import ContinualOptions

FACTS = ("data", "labels", "lora", "training")  # what a call for a task is held against


def check_state(state: Mapping[str, Any], phases: tuple[str, ...]) -> None:
    """Check a journal's state.

    Args:
        state: what is in the file.
        phases: the names of the phases.

    Raises:
        ValueError: something is missing or of another kind; names the place.
    """
    settings = _mapping("settings", state.get("settings"))
    options = _mapping("settings.options", settings.get("options"))
    ContinualOptions.of(options)  # a SubspaceError is a ValueError
    versions, tasks = state.get("versions"), state.get("tasks")
    _need(isinstance(versions, list) and versions, "versions", versions)
    _need(isinstance(tasks, list), "tasks", tasks)
    for place, version in enumerate(versions):
        _version(f"versions.{place}", _mapping(f"versions.{place}", version))
    numbers = [version["version"] for version in versions]
    _need(numbers == sorted(set(numbers)), "versions", numbers)
    names = set(_sides("versions.0.shapes", versions[0].get("shapes")))
    _need(all(set(version["k"]) == names for version in versions), "versions: k", "not of the same modules in all")
    for place, task in enumerate(tasks):
        where = f"tasks.{place}"
        _task(where, _mapping(where, task), phases)
        _need("done" in task["phases"] or place + 1 == len(tasks), f"{where}.phases", "not finished before the next")
    called = [task["name"] for task in tasks]
    _need(len(set(called)) == len(called), "tasks", called)
    finished = [task["name"] for task in tasks if "done" in task["phases"]]
    for place, name in enumerate(finished):
        scores = tasks[place]["phases"]["scores"]
        for what in ("scores", "bytes", "head_bytes"):
            found = _mapping(f"tasks.{place}.phases.scores.{what}", scores.get(what))
            _need(name in found and all(map(_is_number, found.values())), f"tasks.{place}.phases.scores.{what}", found)


def _version(where: str, version: Mapping[str, Any]) -> None:
    for key in ("version", "bytes"):
        _need(_is_whole(version.get(key)), f"{where}.{key}", version.get(key))
    for key in ("kind", "fingerprint"):
        _need(isinstance(version.get(key), str), f"{where}.{key}", version.get(key))
    _need("task" in version, f"{where}.task", "missing")
    _need(version["task"] is None or isinstance(version["task"], str), f"{where}.task", version["task"])
    _need(version.get("drift") is None or _is_number(version["drift"]), f"{where}.drift", version.get("drift"))
    # journals of earlier versions have the largest alone
    drifts = _mapping(f"{where}.drifts", version.get("drifts", {}))
    _need(all(map(_is_number, drifts.values())), f"{where}.drifts", drifts)
    _sides(f"{where}.k", version.get("k"))


def _task(where: str, task: Mapping[str, Any], phases: tuple[str, ...]) -> None:
    _need(isinstance(task.get("name"), str), f"{where}.name", task.get("name"))
    _need(_is_whole(task.get("first_version")), f"{where}.first_version", task.get("first_version"))
    for key in FACTS:
        _need(key in task, f"{where}.{key}", "missing")
    found = _mapping(f"{where}.phases", task.get("phases"))
    for name, facts in found.items():
        _need(name in phases, f"{where}.phases", name)
        _mapping(f"{where}.phases.{name}", facts)
    _need("begin" in found, f"{where}.phases.begin", "missing")
    last = max(phases.index(name) for name in found)
    for name in ("probe", "train", "absorb", "scores"):
        _need(name in found or phases.index(name) > last, f"{where}.phases.{name}", "missing")
    for name in {"probe", "train"} & set(found):
        extra = found[name].get("extra_rank")
        _need(_is_whole(extra), f"{where}.phases.{name}.extra_rank", extra)
    if "absorb" in found:
        change = found["absorb"].get("change")
        _need(change is None or _is_number(change), f"{where}.phases.absorb.change", change)
    if found.get("forward"):
        for key in ("core", "random"):
            value = found["forward"].get(key)
            _need(_is_number(value), f"{where}.phases.forward.{key}", value)


def _sides(where: str, value: Any) -> Mapping[str, Any]:
    """Check a mapping of modules to pairs of whole numbers."""
    found = _mapping(where, value)
    _need(bool(found), where, value)
    for name, pair in found.items():
        _need(isinstance(pair, list) and len(pair) == 2 and all(map(_is_whole, pair)), f"{where}.{name}", pair)
    return found


def _mapping(where: str, value: Any) -> Mapping[str, Any]:
    _need(isinstance(value, Mapping), where, value)
    return value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _need(held: Any, where: str, value: Any) -> None:
    if not held:
        raise ValueError(f"{where}: {value if isinstance(value, str) else repr(value)}"[:200])
