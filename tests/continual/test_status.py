"""What a run's journal tells, without torch: growth, bytes beside LoRAs, what is unfinished; as text, JSON, figure."""

from __future__ import annotations

import json
import math

import pytest

from subspace_peft.cli import main
from subspace_peft.continual import read_status
from subspace_peft.continual.journal import JOURNAL_FILE, Journal
from subspace_peft.continual.options import ContinualOptions
from subspace_peft.errors import BadFileError, SubspaceError

from ..test_light_verbs import loaded

SHAPES = {"q": [100, 50], "v": [100, 60]}


def version(number, kind, task, k, size, **more):
    facts = {"version": number, "kind": kind, "task": task, "fingerprint": f"{number:064x}", "bytes": size}
    return {**facts, "k": {name: [k, k - 1] for name in SHAPES}, **more}


def refitted(number, task, drifts):
    return version(number, "refit", task, 5, 6000, drift=max(drifts.values()), drifts=drifts)


@pytest.fixture
def run(tmp_path):
    """A run of three tasks, of which the second brought no directions and the third made the basis be refitted."""
    settings = {"base_model": "m", "config": {}, "options": ContinualOptions(lora_rank=2).record(), "basis": "0"}
    journal = Journal.create(tmp_path, settings, version(1, "start", None, 4, 5000, shapes=SHAPES))
    for number, (name, extra) in enumerate((("a", 2), ("b", 0), ("c", 2))):
        journal.begin(name, {"first_version": 1, "data": {}, "labels": None, "lora": None, "training": None})
        journal.record(name, "probe", {"extra_rank": extra})
        journal.record(name, "train", {"extra_rank": extra})
        grown = version(2 + number // 2, "absorb", name, 6 + number // 2, 7000) if extra else None
        journal.record(name, "absorb", {"added": extra, "change": 1e-8} if extra else {"added": 0}, version=grown)
        if name == "c":
            journal.record(name, "refit", {}, version=refitted(4, name, {"a": 0.01, "b": 0.02, name: 0.03}))
        names = "abc"[: number + 1]
        facts = {each: 100 + 10 * place for place, each in enumerate(names)}
        journal.record(
            name,
            "scores",
            {
                "scores": {each: 0.5 + 0.1 * place for place, each in enumerate(names)},
                "bytes": facts,
                "head_bytes": dict.fromkeys(names, 40),
            },
        )
        journal.record(name, "done", {})
    return journal


def test_growth_and_bytes(run):
    status = read_status(run.folder)
    assert status.learned == ("a", "b", "c") and status.unfinished is None
    assert status.growth == {name: [(4, 3), (6, 5), (6, 5), (5, 4)] for name in SHAPES}
    assert status.stored == 6000 + 100 + 110 + 120
    lora = 4 * 2 * (100 + 50 + 100 + 60) + 40
    assert status.lora_bytes == dict.fromkeys("abc", lora) and status.loras == 3 * lora
    # N tasks as LoRAs take N·lora bytes; on the basis its own, and N·(a task's + the growth of each)
    assert status.break_even() == math.ceil(5000 / (lora - (330 + 1000) / 3))
    assert status.extra_rank == {"a": 2, "b": 0, "c": 2} and status.changes == {"a": 1e-8, "c": 1e-8}
    assert status.matrix.bwt() == 0.0 and status.matrix.acc() == pytest.approx(0.6)


def test_a_run_that_never_pays(run):
    state = json.loads((run.folder / "continual.json").read_text())
    for each in state["tasks"]:
        each["phases"]["scores"]["bytes"] = dict.fromkeys("abc", 9999)
    (run.folder / "continual.json").write_text(json.dumps(state))
    status = read_status(run.folder)
    assert status.break_even() is None and "it never pays at this growth" in status.text()


def test_the_text(run):
    text = read_status(run.folder).text()
    assert "k=4–5; an earlier task drifted by at most 2.00%, c itself by 3.00% of its update's norm" in text
    assert [line.split() for line in text.splitlines() if line.startswith(("start", "b "))][-2:] == [
        ["start", "3–4", "5,000"],
        ["b", "=", "0", "=", "110"],
    ]
    assert "| b | = | 0 | = | 110 |  |" in read_status(run.folder).text(markdown=True)


def test_the_drift_is_told_of_those_whose_it_is(run):
    state = json.loads((run.folder / JOURNAL_FILE).read_text())
    last = state["versions"][-1]
    assert read_status(run.folder).to_dict()["versions"][-1]["drifts"] == last["drifts"]
    del last["drifts"]["a"], last["drifts"]["b"]
    (run.folder / JOURNAL_FILE).write_text(json.dumps(state))
    assert "k=4–5; c drifted by at most 3.00% of" in read_status(run.folder).text()
    # of a journal that an earlier version wrote it is not known whose it was
    del last["drifts"]
    (run.folder / JOURNAL_FILE).write_text(json.dumps(state))
    assert "k=4–5; a task, c included, drifted by at most 3.00% of" in read_status(run.folder).text()


def test_an_unfinished_task_is_said_and_counts_for_nothing(run):
    run.begin("d", {"first_version": 4, "data": {}, "labels": None, "lora": None, "training": None})
    run.record("d", "probe", {"extra_rank": 1})
    run.record("d", "train", {"extra_rank": 1})
    run.record("d", "absorb", {"added": 1}, version=version(5, "absorb", "d", 9, 9000))
    status = read_status(run.folder)
    assert status.unfinished == ("d", "scores") and status.learned == ("a", "b", "c")
    assert len(status.versions) == 4
    assert "Task 'd' was begun; next is scoring all tasks." in status.text()
    assert status.to_dict()["unfinished"] == {"task": "d", "next": "scores"}


def places(value, before=()):
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*before, key)
        yield from places(value[key], (*before, key))


@pytest.mark.parametrize("put", ["nothing", None, "text", []])
def test_a_journal_that_was_edited_is_read_or_refused_in_words(run, tmp_path, put):
    refused = 0
    for path in list(places(run.state)):
        state = json.loads(json.dumps(run.state))
        place = state
        for key in path[:-1]:
            place = place[key]
        if put == "nothing":
            del place[path[-1]]
        else:
            place[path[-1]] = put
        (tmp_path / JOURNAL_FILE).write_text(json.dumps(state))
        try:
            status = read_status(tmp_path)
            assert status.text() and json.dumps(status.to_dict(), allow_nan=False)
        except BadFileError as error:
            refused += 1
            assert JOURNAL_FILE in str(error), path
    assert refused > 100


def test_nothing_is_learned_yet(tmp_path):
    settings = {"options": ContinualOptions().record()}
    Journal.create(tmp_path, settings, version(1, "start", None, 4, 5000, shapes=SHAPES))
    status = read_status(tmp_path)
    assert status.text() == "No task is learned yet." and status.break_even() is None
    assert json.loads(json.dumps(status.to_dict(), allow_nan=False))["scores"] == []
    with pytest.raises(SubspaceError, match="No task is learned yet, so there is nothing to draw"):
        status.figure(tmp_path / "x.png")


def test_the_figure_has_the_same_bytes_again(run, tmp_path):
    pytest.importorskip("matplotlib")
    status = read_status(run.folder)
    files = [status.figure(tmp_path / name).read_bytes() for name in ("1.png", "2.png")]
    assert files[0] == files[1] and files[0].startswith(b"\x89PNG")


def test_the_verb_needs_no_torch(run, capsys):
    assert main(["continual", "status", str(run.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["learned"], found["bytes"], found["bwt"], found["fwt"]) == (["a", "b", "c"], 6330, 0, None)
    assert set(loaded(f"continual status {run.folder}", "continual run --help").values()) == {"[]"}
