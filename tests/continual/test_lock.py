"""One learner on a folder: a live one is named, a dead one's lock is free."""

from __future__ import annotations

import os
import signal
import time

import pytest

from subspace_peft.continual.lock import LOCK_FILE, FolderLock
from subspace_peft.errors import OccupiedError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, and locks of the system")


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


def test_a_live_process_is_named(tmp_path, holder):
    with pytest.raises(OccupiedError, match=rf"another learner works on it, process {holder} on ") as error:
        FolderLock(tmp_path)
    assert "Wait for its end or stop it, or give another folder." in str(error.value)


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


@pytest.mark.parametrize("text", ["", "no JSON", "[1]", '{"pid": "x"}'])
def test_a_file_that_says_nothing_is_no_obstacle(tmp_path, text):
    (tmp_path / LOCK_FILE).write_text(text)
    FolderLock(tmp_path).release()
