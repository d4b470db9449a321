"""One learner at a time on a folder: a lock that the system takes back from a process that dies."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import weakref
from pathlib import Path
from typing import Any

from .._io.disk import writing
from ..errors import OccupiedError
from ..logging import get_logger

LOCK_FILE = "lock.json"
# Windows locks bytes, which others then cannot read: this one lies far behind what the file says
LOCKED_BYTE = 1 << 30

logger = get_logger()
_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


class FolderLock:
    """A lock on a folder, held from when it is made until `release`, or until its process ends, however it ends.

    The file says which process holds it. It stays when the lock is released; what counts is the system's lock on it.

    Args:
        folder: the folder, which has to exist.

    Raises:
        OccupiedError: a live process holds it, this one included; names the process.
        DiskError: the disk refuses the file.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / LOCK_FILE
        with writing(self.file):
            self._handle: int | None = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
        before = _owner(self._handle)
        if not _take(self._handle):
            self._close()
            raise OccupiedError(
                f"{folder} is in use: another learner works on it, {_named(before)}. Wait for its end or stop it, or"
                " give another folder."
            )
        if before.get("pid"):
            logger.info("%s: taken over from %s, which is gone", folder, _named(before))
        owner = {"pid": os.getpid(), "host": platform.node()}
        with writing(self.file):
            os.ftruncate(self._handle, 0)
            os.lseek(self._handle, 0, os.SEEK_SET)
            os.write(self._handle, json.dumps(owner).encode())
        _held.add(self)

    @property
    def held(self) -> bool:
        """Whether it is held."""
        return self._handle is not None

    def release(self) -> None:
        """Let others work on the folder; a second call does nothing."""
        if self._handle is None:
            return
        with contextlib.suppress(OSError):
            os.ftruncate(self._handle, 0)
        _give_back(self._handle)
        self._close()

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
        self._handle = None
        _held.discard(self)

    def __del__(self) -> None:
        self.release()


def _take(handle: int) -> bool:
    """Return whether this process has the lock now; where the system has no such locks, it has."""
    try:
        import fcntl
    except ImportError:
        return _on_byte(handle, "LK_NBLCK")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a network disk without locks
    return True


def _give_back(handle: int) -> None:
    # closing would leave it with a child that was forked meanwhile
    try:
        import fcntl
    except ImportError:
        _on_byte(handle, "LK_UNLCK")
        return
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_UN)


def _on_byte(handle: int, how: str) -> bool:
    """Lock or unlock one byte, as Windows does; return whether it could be done."""
    try:
        msvcrt: Any = importlib.import_module("msvcrt")
    except ImportError:
        return True
    try:
        os.lseek(handle, LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(handle, getattr(msvcrt, how), 1)
    except PermissionError:
        return False
    except OSError:
        return True  # as above
    return True


def _owner(handle: int) -> dict[str, Any]:
    try:
        found = json.loads(os.read(handle, 1 << 12) or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _named(owner: dict[str, Any]) -> str:
    if not owner.get("pid"):
        return "in another process"
    if owner["pid"] == os.getpid() and owner.get("host") == platform.node():
        return f"in this very process ({owner['pid']}); close that one first, with its close()"
    return f"process {owner['pid']} on {owner.get('host') or 'this machine'}"


def _let_go_in_child() -> None:
    # a forked child would hold the lock on after its parent's end
    for lock in list(_held):
        if lock._handle is not None:
            os.close(lock._handle)
            lock._handle = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
