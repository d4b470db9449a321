"""What a basis's config says of the places of its sources and earlier versions, and where these are on this machine.

As in `recorded`: relative to the basis's folder, or else by the last part and the sha256 alone, of which this machine
notes the whole place, so that a rebuild finds it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .._io.atomic import write_text_aside
from .._io.places import is_absolute, last_part, relative_place
from .._io.untrusted import is_name, is_sha256, read_json
from .cache import cache_home


def shared_info(info: Mapping[str, Any], folder: Path | None, fingerprint: str) -> dict[str, Any]:
    """Return a basis's `info` as it is written into `folder`, without a path of this machine.

    The whole places of its sources are noted on this machine.

    Args:
        info: see `SubspaceBasis`.
        folder: that the basis's config lies in; None where it goes elsewhere.
        fingerprint: the basis's.
    """
    noted: dict[str, str] = {}
    made = dict(info)
    for key in ("sources", "skipped", "lineage"):
        if isinstance(info.get(key), list):
            made[key] = [_shared(each, folder, noted, key) if isinstance(each, dict) else each for each in info[key]]
    build = info.get("build")
    if isinstance(build, Mapping) and isinstance(build.get("weights"), Mapping):
        named = {str(each.get("location")): each.get("name") for each in info.get("sources") or () if each.get("name")}
        weights = {_named(key, named): value for key, value in build["weights"].items()}
        made["build"] = {**build, "weights": weights}
    if noted:
        with contextlib.suppress(OSError):
            write_text_aside(_file(fingerprint), json.dumps(noted, indent=1))
    return made


def _shared(entry: dict[str, Any], folder: Path | None, noted: dict[str, str], kind: str) -> dict[str, Any]:
    location = entry.get("location")
    if not is_name(location) or entry.get("revision"):
        return entry
    path, there = Path(location), False
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # the home of an unknown user, a name too long
        path = path.expanduser()
        there = path.exists()
    if not there and not is_absolute(location):
        return entry  # a Hub id, one that lies in memory, or a place that is not known here
    if kind == "sources" and is_sha256(entry.get("sha256")) and there:
        noted[entry["sha256"]] = os.path.abspath(path)
    written = relative_place(path, folder) if there and folder is not None else None
    if written is None:
        if kind == "lineage":
            return {**entry, "location": None}
        written = last_part(location)
    reason = entry.get("reason")
    more = {} if not isinstance(reason, str) else {"reason": reason.replace(location, written)}
    name = {"name": written} if entry.get("name") == location else {}
    return {**entry, "location": written, **more, **name}


def _named(key: Any, named: Mapping[str, Any]) -> Any:
    """Return the name of the source that a weight is of by its place on this machine; any other key as it is."""
    if not isinstance(key, str) or not is_absolute(key):
        return key
    return named.get(key) or last_part(key)


def shared_entries(entries: Iterable[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Return entries with a ``location``, and maybe a ``reason``, as they are written into `folder`."""
    return [_shared(each, folder, {}, "sources") for each in entries]


def local_info(info: Mapping[str, Any], folder: Path, fingerprint: str) -> dict[str, Any]:
    """Return a basis's `info`, as `folder` has it, with the places of its sources as they are on this machine."""
    made = dict(info)
    for key in ("sources", "lineage"):
        if isinstance(info.get(key), list):
            made[key] = found_sources(info[key], folder, fingerprint)
    return made


def found_sources(entries: Iterable[Any], folder: Path, fingerprint: Any) -> list[Any]:
    """Return the entries of a basis's sources with those places that lie on this machine in full."""
    noted: Mapping[str, Any] = {}
    if is_sha256(fingerprint):
        with contextlib.suppress(OSError, ValueError):
            noted = read_json(_file(fingerprint))
    return [_found(each, folder, noted) if isinstance(each, dict) else each for each in entries]


def _found(entry: dict[str, Any], folder: Path, noted: Mapping[str, Any]) -> dict[str, Any]:
    location, sha256 = entry.get("location"), entry.get("sha256")
    if not is_name(location) or entry.get("revision") or is_absolute(location):
        return entry
    with contextlib.suppress(OSError, ValueError):
        if location.startswith(".") and (beside := folder / location).exists():
            return {**entry, "location": os.path.abspath(beside)}
        if not Path(location).exists() and isinstance(sha256, str) and is_name(noted.get(sha256)):
            return {**entry, "location": noted[sha256]}
    return entry


def _file(fingerprint: str) -> Path:
    return cache_home() / "sources" / f"{fingerprint}.json"
