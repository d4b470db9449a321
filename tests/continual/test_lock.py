"""One learner on a folder: a live one is named, a dead one's lock is free."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest

from subspace_peft.continual.lock import LOCK_FILE, LOCKED_BYTE, FolderLock
from subspace_peft.errors import OccupiedError

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of a folder until it is killed; its id."""
    ready, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            lock = FolderLock(tmp_path)
            os.write(write, b"x" if lock.held else b"-")
            time.sleep(60)
        finally:
            os._exit(1)
    assert os.read(ready, 1) == b"x"
    yield child
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


@needs_fork
def test_a_live_process_is_named(tmp_path, holder):
    with pytest.raises(OccupiedError, match=rf"another learner works on it, process {holder} on ") as error:
        FolderLock(tmp_path)
    assert "Wait for its end or stop it, or give another folder." in str(error.value)


@needs_fork
def test_a_killed_processs_lock_is_taken_over(tmp_path, holder, caplog):
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert str(holder) in (tmp_path / LOCK_FILE).read_text()
    with caplog.at_level("INFO", logger="subspace_peft"):
        lock = FolderLock(tmp_path)
    assert f'"pid": {os.getpid()}' in (tmp_path / LOCK_FILE).read_text()
    lock.release()


def test_a_second_one_in_the_same_process_is_told_so(tmp_path):
    first = FolderLock(tmp_path)
    with pytest.raises(OccupiedError, match="in this very process"):
        FolderLock(tmp_path)
    first.release()
    first.release()
    again = FolderLock(tmp_path)
    assert again.held and not first.held
    again.release()
    assert (tmp_path / LOCK_FILE).read_text() == ""


@needs_fork
def test_a_forked_child_does_not_hold_it_on(tmp_path):
    lock = FolderLock(tmp_path)
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        lock.release()
        FolderLock(tmp_path).release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.fixture
def windows(monkeypatch):
    """Locks as Windows has them: of bytes, held by a handle; (file, byte) → its handle."""
    locked = {}

    def locking(handle, mode, count):
        key = os.fstat(handle).st_ino, os.lseek(handle, 0, os.SEEK_CUR)
        assert count == 1
        if mode == "unlock":
            assert locked.pop(key) == handle
        elif locked.setdefault(key, handle) != handle:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(
        sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK="lock without waiting", LK_UNLCK="unlock")
    )
    return locked


def test_a_byte_is_locked_where_the_system_locks_bytes(tmp_path, windows):
    lock = FolderLock(tmp_path)
    text = (tmp_path / LOCK_FILE).read_text()
    assert [byte for _, byte in windows] == [LOCKED_BYTE] and len(text) < 100 and f'"pid": {os.getpid()}' in text
    with pytest.raises(OccupiedError, match="in this very process"):
        FolderLock(tmp_path)
    assert (tmp_path / LOCK_FILE).read_text() == text
    lock.release()
    assert not windows
    FolderLock(tmp_path).release()


def test_without_any_locks_a_learner_works(tmp_path, monkeypatch):
    for name in ("fcntl", "msvcrt"):
        monkeypatch.setitem(sys.modules, name, None)
    lock = FolderLock(tmp_path)
    assert lock.held
    lock.release()


@pytest.mark.parametrize("text", ["", "no JSON", "[1]", '{"pid": "x"}'])
def test_a_file_that_says_nothing_is_no_obstacle(tmp_path, text):
    (tmp_path / LOCK_FILE).write_text(text)
    FolderLock(tmp_path).release()
