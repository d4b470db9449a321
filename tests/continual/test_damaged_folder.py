"""A run's folder that was changed by hand: what is missing is named, and nothing else is removed for it."""

from __future__ import annotations

import shutil

import pytest

from subspace_peft.errors import BadFileError, OccupiedError

from .runs import contents, copied, learn, learner, options, own_cache


@pytest.fixture(scope="module")
def begun(first_basis, tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    with own_cache(folder):
        learn(folder / "run", "a", first_basis, options=options())
    return folder / "run"


@pytest.fixture
def run(begun, tmp_path):
    return copied(begun, tmp_path / "run")


@pytest.mark.parametrize("gone", ["versions", "versions/2", "versions/2/basis", "versions/2/tasks/a"])
def test_what_was_removed_by_hand_is_missed(run, gone):
    shutil.rmtree(run / gone)
    with pytest.raises(BadFileError, match=r"newest version is 2, and versions/2/.* is missing"):
        learner(run)


def test_an_earlier_journal_removes_nothing(run, tmp_path):
    earlier = (run / "continual.json").read_bytes()
    learn(run, "ab", options=options())
    (run / "continual.json").write_bytes(earlier)
    before = contents(run)
    with pytest.raises(BadFileError, match=r"versions that are there: 3\. Put it back, or the continual\.json"):
        learner(run)
    assert contents(run) == before


def test_without_its_journal_a_run_is_not_begun_over(first_basis, tmp_path):
    kept = options(probe="never")
    learn(tmp_path / "run", "a", first_basis, options=kept)  # on the first version
    (tmp_path / "run" / "continual.json").unlink()
    before = contents(tmp_path / "run")
    with pytest.raises(OccupiedError, match=r"versions/1/tasks/a, and no run: there is no continual\.json"):
        learn(tmp_path / "run", "a", first_basis, options=kept)
    assert contents(tmp_path / "run") == before
