"""What the disk refuses, in plain sentences: which place, why, and what helps."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import DiskError

ELSEWHERE = "give another place"
CACHE = "point SUBSPACE_PEFT_CACHE to a folder that can be written"
HUB_CACHE = "point HF_HOME to a folder that can be written"
WINDOWS = os.name == "nt"
REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR)
# libraries written in other languages give the number in their text only
OS_NUMBER = re.compile(r"\(os error (\d+)\)")


@contextmanager
def writing(target: Path, remedy: str = ELSEWHERE) -> Iterator[None]:
    """Let what the disk refuses while `target` is written be a `DiskError` that says so.

    Args:
        target: the file or folder.
        remedy: what helps, beside making room.

    Raises:
        DiskError: of the kind that Python raised too. Errors about places elsewhere come through as they are.
    """
    try:
        yield
    except DiskError as error:
        # what is known here of a remedy is better than what was known of the file alone
        if remedy == ELSEWHERE:
            raise
        raise disk_error(error, error.errno or 0, target, "written", remedy) from error
    except Exception as error:
        number = number_of(error)
        named = getattr(error, "filename", None)
        if number is None or (isinstance(named, (str, bytes)) and not _about(os.fsdecode(named), target)):
            raise
        raise disk_error(error, number, target, "written", remedy) from error


@contextmanager
def fetching() -> Iterator[None]:
    """Let what the disk refuses while a file is fetched into the Hub's cache be a `DiskError` that says so.

    What the Hub or the network refuses has no number of the system's disk, and comes through as it is.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        named = getattr(error, "filename", None)
        place = Path(os.fsdecode(named)) if isinstance(named, (str, bytes)) else Path("the Hub's cache")
        raise disk_error(error, error.errno, place, "written", HUB_CACHE) from error


@contextmanager
def reading(place: Path) -> Iterator[None]:
    """Let what the disk refuses while `place` is looked at or read be a `DiskError` that says so."""
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        raise disk_error(error, error.errno, place, "read", ELSEWHERE) from error


def writable(target: Path) -> None:
    """Check that `target` can be made or written, by a temporary file in the nearest folder that is there.

    Raises:
        DiskError: it cannot; nothing is left behind.
    """
    own = target.absolute()
    try:
        # this refuses a name that the disk cannot hold, and one below a file
        with contextlib.suppress(FileNotFoundError):
            os.lstat(own)
        there = _nearest(own)
        if there == own and not there.is_dir():
            there = own.parent
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        number = error.errno or errno.EIO
        kind = errno.EACCES if number == errno.ENOENT else number  # such as in /proc
        raise disk_error(error, kind, target, "written", ELSEWHERE) from error


def number_of(error: BaseException) -> int | None:
    """Return the system's number of an error, also where it stands in the text only; None of other errors."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    # safetensors has an error class of its own
    if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
        found = OS_NUMBER.search(str(error))
        return int(found[1]) if found else None
    return None


def disk_error(error: BaseException, number: int, place: Path, done: str, remedy: str) -> DiskError:
    """Return the error that says plainly why `place` cannot be read or written."""
    kind = type(error) if isinstance(error, OSError) else OSError
    # a file that is written aside is known to no user
    place = Path(*(part for part in place.parts if not (part.startswith(".") and part.endswith(".partial"))))
    if number in (errno.ENOSPC, errno.EDQUOT):
        remedy = f"make room there, or {remedy}"
    helps = f"{remedy[:1].upper()}{remedy[1:]}."
    return _both(kind)(number, f"{place} cannot be {done}: {_reason(number, place)} ({os.strerror(number)}). {helps}")


def plain(error: OSError) -> str:
    """Return what an `OSError` says, in plain words where it is one of the system's."""
    if isinstance(error, DiskError) or error.errno is None or error.filename is None:
        return str(error)
    place = os.fsdecode(error.filename)
    return f"{place}: {_reason(error.errno, Path(place))} ({os.strerror(error.errno)})."


@functools.cache
def _both(kind: type[OSError]) -> type[DiskError]:
    """Return a `DiskError` that code which catches `kind` catches too."""
    if kind.__module__ != "builtins" or kind is OSError:
        return DiskError
    return type(kind.__name__, (DiskError, kind), {"__module__": DiskError.__module__})


def _reason(number: int, place: Path) -> str:
    if number in (errno.ENOSPC, errno.EDQUOT):
        left = _free(place)
        what = "the disk is full" if number == errno.ENOSPC else "your quota on this disk is used up"
        return f"{what}{left}"
    if number in (errno.EACCES, errno.EPERM):
        held = ", or a program has the file open" if WINDOWS else ""
        return f"you have no permission for that in {_nearest(place)}{held}"
    if number == errno.ENOTDIR:
        return f"{_nearest(place)} is a file, where a folder is needed"
    longest = max((len(os.fsencode(part)) for part in place.parts), default=0)
    reasons = {
        errno.EROFS: "it is on a file system that can only be read",
        errno.ENAMETOOLONG: f"the name is too long for the disk ({longest} bytes)",
        errno.EISDIR: "it is a folder, where a file is needed",
        errno.EEXIST: "something else of that name is there",
        errno.EFBIG: "the file is larger than the system allows here",
        errno.ENOENT: "there is no such file or folder",
        errno.ELOOP: "its symbolic links lead in a circle",
        errno.EMFILE: "too many files are open in this process",
        errno.EIO: "the disk reports a fault",
        errno.ESTALE: "the network disk has lost it",
    }
    return reasons.get(number, f"{os.strerror(number).lower()}")


def _nearest(place: Path) -> Path:
    own = place.absolute()
    return next((each for each in (own, *own.parents) if os.path.lexists(each)), own)


def _free(place: Path) -> str:
    try:
        there = _nearest(place)
        return f", with {shutil.disk_usage(there).free:,} bytes free in {there if there.is_dir() else there.parent}"
    except OSError:
        return ""


def _about(named: str, target: Path) -> bool:
    """Return whether a file named in an error is `target`, beside it, in it or above it."""
    place, own = Path(named).absolute(), target.absolute()
    return place == own or own in place.parents or place in own.parents or place.parent == own.parent
