"""The journal: what it records is there after every write, and settings that changed are named."""

from __future__ import annotations

import errno
import json
import os

import pytest

from subspace_peft.continual.journal import JOURNAL_FILE, PHASES, Journal, changes, finite, seed_of
from subspace_peft.continual.options import MAY_CHANGE, ContinualOptions
from subspace_peft.errors import BadFileError, DiskError, SubspaceError

SETTINGS = {"base_model": "org/model", "config": {"alpha": 256.0}, "options": ContinualOptions().record()}
FIRST = {"version": 1, "kind": "start", "task": None, "fingerprint": "0" * 64, "k": {"m": [4, 4]}, "bytes": 9}
FIRST["shapes"] = {"m": [8, 8]}
TASK = {"first_version": 1, "data": {}, "labels": None, "lora": None, "training": {}}


@pytest.fixture
def journal(tmp_path):
    return Journal.create(tmp_path, SETTINGS, FIRST)


def test_what_is_recorded_is_read_again(journal, tmp_path):
    journal.begin("a", TASK)
    journal.record("a", "probe", {"extra_rank": 2})
    journal.record("a", "train", {"extra_rank": 2})
    journal.record("a", "absorb", {"added": 2}, version={**FIRST, "version": 2, "task": "a"})
    again = Journal.read(tmp_path)
    assert again.state == journal.state
    assert [each["version"] for each in again.versions] == [1, 2]
    assert (again.phase("a", "train"), again.phase("a", "scores"), again.phase("b", "train")) == (
        {"extra_rank": 2},
        None,
        None,
    )
    assert (again.learned(), again.unfinished()["name"]) == ([], "a")
    again.record("a", "done", {})
    assert (again.learned(), again.unfinished()) == (["a"], None)


def test_a_task_that_is_given_up_takes_its_versions_along(journal):
    journal.begin("a", TASK)
    journal.record("a", "absorb", {}, version={**FIRST, "version": 2, "task": "a"})
    journal.drop("a")
    assert (journal.tasks, [each["version"] for each in journal.versions]) == ([], [1])


def test_no_journal(tmp_path):
    assert Journal.read(tmp_path) is None and Journal.read(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"format_version": 2}',
        '{"format_version": 1, "tasks": [{}], "versions": [], "settings": {}}',
        '{"format_version": 1, "tasks": [], "versions": [{"version": "x"}], "settings": {}}',
        '{"format_version": 1, "tasks": [], "versions": [], "settings": 3}',
        '{"format_version": true}',
    ],
)
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / JOURNAL_FILE).write_text(text)
    with pytest.raises(BadFileError, match=r"continual\.json: it is no journal"):
        Journal.read(tmp_path)


def test_a_newer_version_s_file_asks_for_an_upgrade(tmp_path):
    (tmp_path / JOURNAL_FILE).write_text('{"format_version": 2, "subspace_peft_version": "99.0"}')
    with pytest.raises(BadFileError, match=r"its format is 2, .* It was written by subspace-peft 99\.0"):
        Journal.read(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_where_the_disk_refuses_the_last_state_stays(journal, tmp_path, monkeypatch, number):
    journal.begin("a", TASK)
    before, state = (tmp_path / JOURNAL_FILE).read_bytes(), journal.state

    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=r"continual\.json cannot be written"):
        journal.record("a", "train", {"extra_rank": 0})
    assert (tmp_path / JOURNAL_FILE).read_bytes() == before and journal.state == state
    assert sorted(each.name for each in tmp_path.iterdir()) == [JOURNAL_FILE]


def test_settings_that_changed_are_named_with_both_values(journal):
    options = {**SETTINGS["options"], "extra_rank": 4, "max_k": 32}
    with pytest.raises(SubspaceError) as error:
        journal.check_settings({**SETTINGS, "options": options, "config": {"alpha": 128.0}}, MAY_CHANGE)
    assert "options.extra_rank was 2, and is 4 now" in str(error.value)
    assert "config.alpha was 256.0, and is 128.0 now" in str(error.value) and "max_k" not in str(error.value)
    # a size that is allowed decides nothing about what was learned
    journal.check_settings({**SETTINGS, "options": {**SETTINGS["options"], "max_k": 32}}, MAY_CHANGE)


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {}, [("a", "1", "null")]),
        ({}, {"a": None}, []),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, [("a.c", "2", "3")]),
        ({"a": {"b": 1}}, {"a": 3}, [("a", '{"b": 1}', "3")]),
        ({"a": [1, 2]}, {"a": [2, 1]}, [("a", "[1, 2]", "[2, 1]")]),
    ],
)
def test_changes(old, new, found):
    assert changes(old, new) == found


def test_a_phases_seed_is_its_own_and_the_same_everywhere():
    seeds = {seed_of(0, name, phase) for name in ("a", "b", "ab") for phase in PHASES}
    assert len(seeds) == 3 * len(PHASES) and all(0 <= seed < 1 << 31 for seed in seeds)
    # words do not run together, and the numbers stay: runs that were begun go on with them
    assert seed_of(0, "ab", "c") != seed_of(0, "a", "bc")
    assert [seed_of(0, "a", "train"), seed_of(1, "a", "train")] == [468964183, 689182661]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "x", [1, 2]])
def test_a_score_is_a_finite_number(value):
    with pytest.raises(SubspaceError, match="The score"):
        finite("The score", value)


def test_no_nan_gets_into_the_file(journal):
    journal.begin("a", TASK)
    with pytest.raises(ValueError, match="not JSON compliant"):
        journal.record("a", "train", {"loss": float("nan")})
    assert json.loads((journal.folder / JOURNAL_FILE).read_text())["tasks"][0]["phases"] == {"begin": {}}
