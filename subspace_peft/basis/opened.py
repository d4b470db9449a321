"""Open a basis to look at its files: as `SubspaceBasis.from_pretrained` opens it, without torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from . import cache
from .locations import add_note
from .source_places import local_info
from .stored import StoredBasis, open_stored


def open_to_look(path_or_id: str | Path, *, token: str | bool | None = None) -> StoredBasis:
    """Open the basis in a folder or on the Hub, keep what was fetched, and note where it lies.

    Arguments and errors are those of `SubspaceBasis.from_pretrained`.
    """
    stored = open_stored(path_or_id, token=token)
    if stored.fetched:
        cache.keep(
            stored.file.parent, fingerprint=stored.fingerprint, location=stored.location, revision=stored.revision
        )
    add_note(stored.fingerprint, stored.location, stored.revision)
    return replace(stored, info=local_info(stored.info, stored.file.parent, stored.fingerprint))
