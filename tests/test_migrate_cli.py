"""`subspace-peft update` and `migrate`, and bundles: tasks move to a basis's next version, all or none."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel

from subspace_peft import (
    SubspaceBasis,
    TaskBank,
    bundle_tasks,
    load_task,
    migrate_bundle,
    open_bundle,
    project_lora,
    update_basis,
)
from subspace_peft.bundle import compress_fleet
from subspace_peft.cli import main
from subspace_peft.errors import SubspaceError

from .bundle.conftest import KINDS, NAMES, logits, save
from .models import bert, train_lora


@pytest.fixture(scope="module")
def saved(bases, tmp_path_factory):
    root = tmp_path_factory.mktemp("tasks")
    for i, name in enumerate(NAMES):
        save(bert, root / name, bases[bert].location, i, **KINDS[i])
    return root


@pytest.fixture
def folders(saved, tmp_path):
    """A task of every kind, for the test to change."""
    shutil.copytree(saved, tmp_path / "tasks")
    return [tmp_path / "tasks" / name for name in NAMES]


@pytest.fixture
def new_loras(tmp_path):
    return [str(train_lora(bert, tmp_path / f"new{i}", seed=50 + i)) for i in range(2)]


def test_update_carries_tasks_and_bundles_over(bases, folders, new_loras, tmp_path, capsys):
    old = {folder.name: logits(PeftModel.from_pretrained(bert(), folder)) for folder in folders}
    bundle_tasks(folders, tmp_path / "bundle", metrics={"task0": {"accuracy": 0.91}}, progress=False)
    command = [
        "update",
        bases[bert].location,
        *new_loras,
        "--out",
        str(tmp_path / "v2"),
        "--add",
        "5",
        "--add-in",
        "3",
        "--tasks",
        *map(str, folders),
        str(tmp_path / "bundle"),
        "--tasks-out",
        str(tmp_path / "moved"),
        "--json",
    ]
    assert main(command) == 0
    said = json.loads(capsys.readouterr().out)
    new = SubspaceBasis.from_pretrained(tmp_path / "v2")
    assert said["fingerprint"] == new.fingerprint and said["version"] == 2 and said["from"] == bases[bert].fingerprint
    assert len(said["tasks"]) == len(folders) + 1 and all(each["drift"] < 1e-6 for each in said["tasks"])
    moved = open_bundle(tmp_path / "moved" / "bundle")
    assert moved.fingerprint == new.fingerprint and moved["task0"].metrics == {"accuracy": 0.91}
    for name, before in old.items():
        model = PeftModel.from_pretrained(bert(), tmp_path / "moved" / name)
        assert torch.allclose(logits(model), before, atol=1e-5)
        assert model.peft_config["default"].basis_fingerprint == new.fingerprint
        assert torch.allclose(logits(load_task(bert(), moved, name)), before, atol=1e-5)
    assert main([*command[:-1]]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "+5 output and +3 input directions" in out and "version 2 of the basis" in out


def test_moved_tasks_and_new_ones_share_a_bank(bases, folders, new_loras, tmp_path):
    new = update_basis(bases[bert], new_loras, progress=False)
    new.save_pretrained(tmp_path / "v2")
    assert (
        main(
            [
                "migrate",
                str(folders[0]),
                str(folders[2]),
                "--basis",
                str(tmp_path / "v2"),
                "--out",
                str(tmp_path / "moved"),
            ]
        )
        == 0
    )
    project_lora(new_loras[0], new).save_pretrained(tmp_path / "fresh")
    model = PeftModel.from_pretrained(bert(), tmp_path / "fresh")
    bank = TaskBank(model)
    for name in ("task0", "task2"):
        bank.add(name, str(tmp_path / "moved" / name))
    bank.add("fresh", str(tmp_path / "fresh"))
    rows = logits(model, adapter_names=["task0", "fresh", "task2"])
    for row, folder in enumerate((folders[0], tmp_path / "fresh", folders[2])):
        assert torch.allclose(rows[row], logits(PeftModel.from_pretrained(bert(), folder))[row], atol=1e-5)


def test_residuals_are_absorbed_and_sources_go_along(bases, new_loras, tmp_path):
    compress_fleet(new_loras, bases[bert].location, tmp_path / "bundle", min_energy=0.9, residual=4, progress=False)
    old = open_bundle(tmp_path / "bundle")
    grown = update_basis(bases[bert], new_loras, progress=False)
    grown.save_pretrained(tmp_path / "v2")
    moved, drifts = migrate_bundle(old, grown, tmp_path / "moved", progress=False)
    for name in old:
        assert max(drifts[name].values()) < 1e-6
        before, after = old.entry(name), moved.entry(name)
        assert after["source"] == before["source"] and after["energy_residual"] == 0 < before["energy_residual"]
        assert after["energy_kept"] == before["energy_kept"] + before["energy_residual"]
        # the new basis has the directions that the old one lacked
        assert moved[name].extra_rank == 0 < old[name].extra_rank
        assert torch.allclose(logits(load_task(bert(), old, name)), logits(load_task(bert(), moved, name)), atol=1e-5)


def test_all_or_none(bases, folders, new_loras, tmp_path, capsys):
    command = ["update", bases[bert].location, *new_loras, "--out", str(tmp_path / "v2"), "-k", "4"]
    tasks = ["--tasks", *map(str, folders), "--tasks-out", str(tmp_path / "moved")]
    bundle_tasks(folders[:2], tmp_path / "bundle", progress=False)
    for some in (tasks, ["--tasks", str(tmp_path / "bundle"), "--tasks-out", str(tmp_path / "moved")]):
        assert main([*command, *some]) == 1
        assert "--max-drift 1e-05" in capsys.readouterr().err
    assert not (tmp_path / "v2").exists() and not (tmp_path / "moved").exists()
    assert main([*command, *tasks, "--max-drift", "1", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["arguments"]["tasks"] == len(folders) and 0 < max(said["drift"].values()) < 1
    assert {each["converted_from"] for each in said["tasks"]} == {None, "diagonal"}


def test_wrong_calls(bases, folders, new_loras, tmp_path, capsys):
    basis = bases[bert].location
    for command, message in (
        (["update", basis, *new_loras, "--out", str(tmp_path / "v2"), "--tasks", str(folders[0])], "Give both"),
        (["update", basis, *new_loras, "--out", str(tmp_path / "v2"), "--add", "x"], "no number"),
        (
            ["migrate", str(folders[0]), str(folders[0]), "--basis", basis, "--out", str(tmp_path / "o")],
            "called 'task0'",
        ),
        (["migrate", str(folders[0]), "--basis", basis, "--out", str(folders[0].parent)], "is the same place as"),
        (["migrate", str(tmp_path / "nothing"), "--basis", basis, "--out", str(tmp_path / "o")], "nothing"),
    ):
        assert main(command) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "v2").exists()
    bundle = bundle_tasks(folders[:1], tmp_path / "bundle", progress=False)
    with pytest.raises(SubspaceError, match="the bundle itself"):
        migrate_bundle(bundle, bases[bert], tmp_path / "bundle")
    memory = update_basis(bases[bert], new_loras, progress=False)
    with pytest.raises(SubspaceError, match="has to be stored"):
        migrate_bundle(bundle, memory, tmp_path / "elsewhere")
