"""Places of files as they are typed in a shell."""

from __future__ import annotations

import shlex
from pathlib import Path

from .._io.places import is_absolute, last_part, relative_place


def seen_from_here(place: str | Path) -> str:
    """Return a place as seen from the working directory, without a path of this machine."""
    said = str(place)
    return (relative_place(said, Path.cwd()) or last_part(said)).removeprefix("./") if is_absolute(said) else said


def typed(place: str | Path) -> str:
    """Return a place as it is typed in a shell in the working directory."""
    said = seen_from_here(place)
    # a pattern is for the shell to fill in
    return said if "*" in said and shlex.quote(said.replace("*", "")) == said.replace("*", "") else shlex.quote(said)
