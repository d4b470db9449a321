"""Where this machine has seen a basis: notes by fingerprint in the cache, for loaders that know only the fingerprint.

A note is a hint of a few bytes. The basis that it leads to is verified on use, so a stale or hostile note cannot bring
in another basis.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from .._io.atomic import write_text_aside
from .._io.untrusted import is_name, is_revision, is_sha256
from .cache import cache_home

MOST_NOTES = 8


def add_note(fingerprint: str, location: str, revision: str | None) -> None:
    """Note that a basis lies at `location`, a folder or Hub id.

    A cache that cannot be written is no reason to fail.
    """
    entry = {"location": location, "revision": revision}
    with contextlib.suppress(OSError):
        known = [old for old in read_notes(fingerprint) if old["location"] != location]
        write_text_aside(_file(fingerprint), json.dumps([entry, *known[: MOST_NOTES - 1]], indent=1))


def read_notes(fingerprint: str) -> list[dict[str, str | None]]:
    """Return the notes on a basis, ``{"location", "revision"}`` each, the newest first."""
    if not is_sha256(fingerprint):
        return []
    try:
        notes = json.loads(_file(fingerprint).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    listed = [note for note in notes if isinstance(note, dict)] if isinstance(notes, list) else []
    return [
        {"location": note["location"], "revision": note.get("revision")}
        for note in listed[:MOST_NOTES]
        if is_name(note.get("location")) and (note.get("revision") is None or is_revision(note["revision"]))
    ]


def _file(fingerprint: str) -> Path:
    return cache_home() / "locations" / f"{fingerprint}.json"
