"""kill −9 in every phase: the same calls go on from there, and leave the same bytes as a run that was let alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from subspace_peft.continual import read_status
from subspace_peft.continual.journal import Journal

from .runs import contents, copied, killed, learn, options, own_cache

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
MOST = 40  # processes that a run may take


@pytest.fixture(scope="module")
def begun(first_basis: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one task, which later tests go on with in copies."""
    folder = tmp_path_factory.mktemp("begun")
    with own_cache(folder):
        learn(folder / "run", "a", first_basis, options=options())
    return folder / "run"


def go_on(folder: Path) -> None:
    learn(folder, "ab", options=options())


@pytest.fixture(scope="module")
def whole(begun: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the run with a second task, undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    with own_cache(folder):
        go_on(copied(begun, folder / "run"))
    return contents(folder / "run")


def at_write(number: int, *, before: bool):
    """Return what kills a process at its `number`-th record, before that is written or right after."""

    def arm(kill):
        original, count = Journal.write, [0]

        def write(self, state):
            count[0] += 1
            if before and count[0] == number:
                kill()
            original(self, state)
            if count[0] == number:
                kill()

        Journal.write = write

    return arm


def at_replace(number: int):
    """Return what kills a process when it renames its `number`-th file into place."""

    def arm(kill):
        original, count = os.replace, [0]

        def replace(*args, **more):
            count[0] += 1
            if count[0] == number:
                kill()
            return original(*args, **more)

        os.replace = replace

    return arm


def at_checkpoint(number: int, *, before: bool):
    """Return what kills a process as it finishes its `number`-th checkpoint."""

    def arm(kill):
        from transformers import TrainerState

        original, count = TrainerState.save_to_json, [0]

        def save(self, file):
            count[0] += 1
            if before and count[0] == number:
                Path(file).write_text("{")  # half of it
                kill()
            original(self, file)
            if count[0] == number:
                kill()

        TrainerState.save_to_json = save

    return arm


def chain(folder: Path, arms) -> list[str]:
    """Go on with a run in process after process, each killed as the next of `arms` says, until one comes to its end.

    Returns:
        Which phase came next where each of them was killed.
    """
    died = []
    for arm, _ in zip(arms, range(MOST), strict=False):
        if not killed(lambda: go_on(folder), arm):
            break
        state = read_status(folder)
        died.append(state.unfinished[1] if state.unfinished else "–")
    else:
        go_on(folder)
    return died


def every(arm):
    while True:
        yield arm


def test_after_each_record(begun, whole, tmp_path):
    folder = copied(begun, tmp_path / "run")
    died = chain(folder, every(at_write(1, before=False)))
    assert died == ["probe", "train", "absorb", "scores", "done", "–"]
    assert contents(folder) == whole


def test_before_each_record_when_the_results_are_on_disk(begun, whole, tmp_path):
    folder = copied(begun, tmp_path / "run")
    # the second, so that each process comes a phase further
    died = chain(folder, every(at_write(2, before=True)))
    assert died == ["probe", "train", "absorb", "scores", "done"]
    assert contents(folder) == whole


def test_between_any_two_files(begun, whole, tmp_path):
    folder = copied(begun, tmp_path / "run")
    died = chain(folder, (at_replace(2 + 2 * number) for number in range(MOST)))
    assert {"train", "absorb", "scores"} <= set(died)
    assert contents(folder) == whole


@pytest.mark.parametrize("before", [True, False])
def test_within_a_training(begun, whole, tmp_path, before):
    folder = copied(begun, tmp_path / "run")
    assert killed(lambda: go_on(folder), at_checkpoint(2, before=before))
    assert len(list((folder / "work" / "b" / "train").glob("checkpoint-*"))) == 2
    go_on(folder)
    assert contents(folder) == whole


def test_while_a_run_begins(first_basis, begun, tmp_path):
    folder = tmp_path / "run"
    for arm in (at_replace(1), at_write(1, before=True), at_write(1, before=False)):
        assert killed(lambda: learn(folder, "a", first_basis, options=options()), arm)
    learn(folder, "a", first_basis, options=options())
    assert contents(folder) == contents(begun)
