"""Files that a newer version of this package wrote: recognised by the version in them, with the way to read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._install import UPGRADE
from .._io.untrusted import read_json
from .._version import __version__


def is_newer(given: Any, own: str = __version__) -> bool:
    """Return whether a version that a file names is newer than `own`, this package's by default."""
    from packaging.version import InvalidVersion, Version

    try:
        # without its local part: PEFT writes the commit of a development version behind an @
        return Version(str(given)[:80].split("@")[0]) > Version(own)
    except InvalidVersion:
        return False


def written_by(file: Path, key: str = "subspace_version") -> Any:
    """Return the version that a config's file names; None where it cannot be read."""
    try:
        return read_json(file).get(key)
    except (OSError, ValueError):
        return None


def upgrade_hint(given: Any, always: bool = False) -> str:
    """Return the words that follow an error about a file of a newer version, a space first; empty for others.

    Args:
        given: the version that the file says it was written by.
        always: whether the file is known to be newer, by its format, whatever version it names.
    """
    if is_newer(given):
        by = f" It was written by subspace-peft {str(given)[:40]}, and this is {__version__}:"
    elif always:
        by = f" It was written by a newer subspace-peft than this {__version__}:"
    else:
        return ""
    return f"{by} {UPGRADE}, or fetch a version of it that this one can read."
