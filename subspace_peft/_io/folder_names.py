"""Names that become folders, on systems and disks where some names cannot be used or mean one folder."""

from __future__ import annotations

import os
import re
import tempfile
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from ..errors import SubspaceError

WINDOWS = os.name == "nt"
# Windows keeps these for devices, whatever follows a dot
DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)


def check_folder_names(out: Path, names: Iterable[str], what: str = "task") -> None:
    """Check that each of `names` can be a folder of its own in `out`, before the first is written.

    Args:
        out: the folder that gets them; it need not exist yet.
        names: what the folders are to be called.
        what: what they are the names of.

    Raises:
        SubspaceError: the system cannot use one, or the disk takes two of them for one; says what helps.
    """
    names = list(names)
    if WINDOWS:
        for name in names:
            if DEVICE.fullmatch(name) or name != name.rstrip(". "):
                raise SubspaceError(
                    f"Windows allows no folder {name!r}. Write that {what} alone, into a folder of another name."
                )
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name and _takes_for_one(out, other, name):
            raise SubspaceError(
                f"The {what}s {other!r} and {name!r} would be written to one folder, as the disk of {out} does not"
                f" tell their names apart. Write one of them alone, into a folder of another name."
            )


def _takes_for_one(out: Path, one: str, other: str) -> bool:
    """Return whether the disk that `out` is on, or will be, finds a file under both names."""
    own = out.expanduser().absolute()
    there = next((each for each in (own, *own.parents) if each.is_dir()), own)
    try:
        with tempfile.TemporaryDirectory(dir=there) as scratch:
            Path(scratch, one).touch()
            return Path(scratch, other).exists()
    except OSError:
        return False  # the writer says what is wrong there
