"""What a file that refers to a basis says of its place.

A folder is written relative to the file's own folder, and never with the path of a machine; where it cannot be, the
fingerprint has to lead there, and this machine notes where. So whatever begins with a dot is a folder, and all else a
Hub id. Files of earlier versions have absolute paths, and names as the user gave them.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path

from .._io.places import is_absolute, last_part, relative_place
from .._io.untrusted import read_json
from ..hub import only_local
from .cache import cache_home
from .files import CONFIG_FILE
from .living import alive
from .locations import add_note, read_notes


def candidates(reference: str, near: Path | None) -> dict[Path, bool]:
    """Return the folders that a recorded place may mean, in the order in which they are tried.

    A relative one is looked for beside the file that names it, in the folder above, and in the working directory. An
    absolute one, as earlier versions wrote them, is tried itself, and where the file may have been moved to with it.

    Args:
        reference: as it is recorded.
        near: the folder of the file that names it; None where it is not known.

    Returns:
        Folder → whether it is the place that is recorded, and no guess.
    """
    path = Path(reference)
    with contextlib.suppress(RuntimeError):  # the home of an unknown user
        path = path.expanduser()
    if is_absolute(reference):
        return {path: True} if near is None else {path: True, near.parent / last_part(reference): False}
    return dict.fromkeys([path] if near is None else [near / path, near.parent / path, path], True)


def own_places(location: str | None, revision: str | None, fingerprint: str | None, near: Path | None) -> list[Path]:
    """Return the folder of this machine in which a task's or bundle's basis lies, by what is known; else none.

    Args:
        location: as it is recorded, or as it was given.
        revision: on the Hub; nothing on this machine is needed then.
        fingerprint: the basis's.
        near: folder of the file that names it.
    """
    if revision is not None or fingerprint is None:
        return []
    found = on_disk(location or ".", fingerprint, near)
    return [] if found is None else [found]


def recorded_place(
    location: str | None, revision: str | None, fingerprint: str | None, *, folder: Path | None, near: Path | None
) -> tuple[str | None, str | None]:
    """Return how a basis is written into a file, and note on this machine where it is.

    Args:
        location: a folder, as it is known now, or a Hub id.
        revision: on the Hub.
        fingerprint: the basis's; None where it is not known yet.
        folder: that the file lies in; None where it goes elsewhere, so that no relative path leads anywhere.
        near: folder from which a relative `location` is looked for first.

    Returns:
        A Hub id, a path that begins with a dot, or None where only the fingerprint leads to the basis; and the
        fingerprint, where it is known.
    """
    if location is None or (not is_absolute(location) and revision is not None):
        return location, fingerprint
    found = on_disk(location, fingerprint, near)
    if found is None:
        beside = () if near is None else (near, near.parent)
        if not only_local(location, revision, *beside):
            return location, fingerprint
        if fingerprint is not None:
            return None, fingerprint
        # nothing is known of it but its name
        return (f"./{last_part(location)}" if is_absolute(location) else location), None
    mark = fingerprint or _fingerprint(found)
    add_note(mark, str(found), None)
    kept = found.is_relative_to(Path(os.path.realpath(cache_home())))
    written = None if folder is None or kept else relative_place(found, folder)
    if written is None and not kept and not read_notes(mark):
        warnings.warn(
            f"What is saved in {folder or 'another place'} names its basis by the fingerprint {mark[:12]}… alone, and"
            f" this machine's cache {cache_home()} cannot be written to note that it lies in {found}: pass the basis"
            " when you load the task (basis=), or keep both in one folder.",
            stacklevel=2,
        )
    # a fingerprint that was not asked for is written only where nothing else leads there
    return written, mark if written is None else fingerprint


def on_disk(location: str, fingerprint: str | None, near: Path | None) -> Path | None:
    """Return the folder of this machine that a place means; None where there is none with that fingerprint.

    Args:
        location: a folder, or a Hub id.
        fingerprint: the basis's; None for any.
        near: folder from which a relative `location` is looked for first.
    """
    places = list(candidates(location, near))
    if fingerprint is not None:
        held = alive(fingerprint)
        known = [held.location] if held is not None and held.location and held.revision is None else []
        notes = [str(note["location"]) for note in read_notes(fingerprint) if note["revision"] is None]
        places += [Path(each) for each in (*known, *notes) if is_absolute(each)] if only_local(location) else []
    for place in places:
        with contextlib.suppress(OSError, ValueError):
            if (place / CONFIG_FILE).is_file() and fingerprint in (None, _fingerprint(place)):
                return Path(os.path.realpath(place))
    return None


def _fingerprint(folder: Path) -> str:
    return str(read_json(folder / CONFIG_FILE).get("fingerprint"))
