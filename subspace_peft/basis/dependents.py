"""Which tasks and bundles of this machine are on a basis: notes by fingerprint in the cache, as in `locations`.

They are hints, which tell the one who replaces a basis what depends on it. Each is held against the disk when it is
read, so that stale ones are left out.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path

from .._io.atomic import write_text_aside
from .._io.occupied import BUNDLE, TASK, look
from .._io.untrusted import is_name, is_sha256
from .cache import cache_home

MOST_NOTES = 200
NAMED = 3


def add_dependent(fingerprint: str | None, folder: Path) -> None:
    """Note that a task or bundle in `folder` is on a basis.

    A cache that cannot be written is no reason to fail.
    """
    with contextlib.suppress(OSError):
        if not is_sha256(fingerprint):
            return
        place, known = str(folder.resolve()), _notes(str(fingerprint))
        if known[:1] != [place]:
            kept = [old for old in known if old != place and Path(old).is_dir()]
            write_text_aside(_file(str(fingerprint)), json.dumps([place, *kept[: MOST_NOTES - 1]], indent=1))


def dependents_of(fingerprint: str | None, needs: Collection[str] = ("folder", "hub")) -> list[str]:
    """Return the folders of tasks and bundles that were noted, are still there, and still need that basis.

    Args:
        fingerprint: the basis's.
        needs: where they take it from, as `Found.needs` says.
    """
    if not is_sha256(fingerprint):
        return []
    return list(_still(str(fingerprint), needs))


def all_noted(fingerprint: str | None) -> bool:
    """Return whether all dependents of a basis are among the notes: older ones make room where there are too many."""
    return not is_sha256(fingerprint) or len(_notes(str(fingerprint))) < MOST_NOTES


def named_dependents(fingerprint: str | None, needs: Collection[str] = ("folder",)) -> str:
    """Return words that name what is known to depend on a basis, with their number; empty where nothing is."""
    found = dependents_of(fingerprint, needs)
    if not found:
        return ""
    shown = ", ".join(found[:NAMED]) + (" …" if len(found) > NAMED else "")
    what = "1 task or bundle" if len(found) == 1 else f"{len(found)} tasks or bundles"
    return f"{what} of this machine need{'s' * (len(found) == 1)} that basis: {shown}"


def _still(fingerprint: str, needs: Collection[str]) -> Iterator[str]:
    for place in _notes(fingerprint):
        with contextlib.suppress(OSError):
            if any(
                each.kind in (TASK, BUNDLE) and each.needs in needs and each.basis == fingerprint
                for each in look(Path(place))
            ):
                yield place


def _notes(fingerprint: str) -> list[str]:
    try:
        notes = json.loads(_file(fingerprint).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    return [str(each) for each in notes if is_name(each)][:MOST_NOTES] if isinstance(notes, list) else []


def _file(fingerprint: str) -> Path:
    return cache_home() / "dependents" / f"{fingerprint}.json"
