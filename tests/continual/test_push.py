"""Versions and tasks on the Hub: a commit for each version, each task pinned to its own; a refusal is no loss."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..push_hub import PushHub
from ..test_sharing import client
from .runs import contents

LEARN = """
    import warnings
    from pathlib import Path
    warnings.simplefilter("ignore")
    from tests.continual.runs import data, learner, options
    pushed = options(push_basis_to="me/basis", push_tasks_to="me/run-{{task}}", private=True)
    with learner(Path({run!r}), {basis!r}, options=pushed) as made:
        for name in {names!r}:
            made.learn(name, data(ord(name)), data(ord(name) + 100))
        print(made.status.unfinished)
"""
LOAD = """
    import subspace_peft
    from peft import PeftModel
    from tests.continual.runs import model
    for name in "ab":
        config = PeftModel.from_pretrained(model(), f"me/run-{name}").peft_config["default"]
        print(config.basis, config.basis_revision)
"""
TOKEN = "hf_test"


@pytest.fixture
def hub() -> Iterator[PushHub]:
    with PushHub(token=TOKEN) as server:
        yield server


def test_each_version_is_a_commit_and_each_task_is_pinned_to_its_own(hub, first_basis, tmp_path):
    program = LEARN.format(run=str(tmp_path / "run"), basis=str(first_basis), names="ab")
    client(hub, tmp_path / "one", program, HF_TOKEN=TOKEN)
    assert set(hub.repos) == {"me/basis", "me/run-a", "me/run-b"} and hub.repos["me/basis"].private
    versions = [
        json.loads(files["basis_config.json"])
        for files in hub.repos["me/basis"].commits.values()
        if "basis_config.json" in files
    ]
    assert [each["version"] for each in versions] == [2, 3]
    assert [len(each["lineage"]) for each in versions] == [1, 2]
    assert versions[1]["lineage"][1]["fingerprint"] == versions[0]["fingerprint"]
    # elsewhere, with nothing but the names
    said = client(hub, tmp_path / "two", LOAD, HF_TOKEN=TOKEN)
    places = [line.split() for line in said.splitlines()]
    commits = [sha for sha, files in hub.repos["me/basis"].commits.items() if "basis_config.json" in files]
    assert places == [["me/basis", commits[0]], ["me/basis", commits[1]]]
    # the tasks in the run's folder stay on the basis beside them
    for config in Path(tmp_path / "run").rglob("tasks/*/adapter_config.json"):
        assert json.loads(config.read_text())["basis_revision"] is None


def test_a_hub_that_refuses_costs_nothing_but_the_push(hub, first_basis, tmp_path):
    program = LEARN.format(run=str(tmp_path / "run"), basis=str(first_basis), names="a")
    client(hub, tmp_path / "one", program, fails=True, HF_TOKEN="hf_wrong")
    assert not hub.repos or not any(repo.commits for repo in hub.repos.values())
    before = contents(tmp_path / "run" / "versions")
    status = json.loads((tmp_path / "run" / "continual.json").read_text())["tasks"][0]["phases"]
    assert list(status) == ["begin", "probe", "train", "absorb", "scores"]
    assert client(hub, tmp_path / "one", program, HF_TOKEN=TOKEN) == "None\n"
    after = contents(tmp_path / "run" / "versions")
    assert "me/run-a" in hub.repos and all(before[name] == value for name, value in after.items())
