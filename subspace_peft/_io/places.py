"""How a place of this machine is written into a file that may be shared: relative to the file's folder, or not at all.

A relative path goes on leading there when both are moved together, and says nothing of the machine.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PureWindowsPath

# steps up and down that two folders that belong together are apart
MOST_STEPS = 3


def relative_place(place: str | Path, folder: str | Path) -> str | None:
    """Return the path that leads from `folder` to `place`, with ``/``, beginning with ``./`` or ``../``.

    None where the two have nothing in common but what is this machine's: the path would name a user's folder, or lie
    on another drive.
    """
    there, here = (Path(os.path.realpath(Path(each).expanduser())) for each in (place, folder))
    try:
        common = Path(os.path.commonpath([there, here]))
    except ValueError:
        return None
    if common == Path(common.anchor) or common in _home().parents:
        return None
    up, down = len(here.relative_to(common).parts), there.relative_to(common)
    if up > MOST_STEPS or len(down.parts) > MOST_STEPS:
        return None
    if not up:
        return f"./{down.as_posix()}" if down.parts else "."
    return "/".join([".."] * up + list(down.parts))


def _home() -> Path:
    """Return the user's home; the root of the disk of a user without one, as containers run them."""
    try:
        return Path(os.path.realpath(Path.home()))
    except RuntimeError:
        return Path(Path.cwd().anchor)


def last_part(place: str) -> str:
    """Return the last part of a path of any system: all that a file to be shared says of a place elsewhere."""
    return re.split(r"[/\\]", place.rstrip("/\\"))[-1] or place


def shown_place(place: str | None) -> str | None:
    """Return a place as a card shows it: of an absolute path its last part, as seen from the folder above."""
    return f"./{last_part(place)}" if place and is_absolute(place) else place or None


def is_absolute(place: str) -> bool:
    """Return whether a path, of any system, begins at the root of a machine or a user's home."""
    windows = PureWindowsPath(place)
    return place.startswith(("/", "~", "\\")) or bool(windows.drive and windows.root)
