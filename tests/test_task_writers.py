"""One contract for all that write a task's folder: what `PeftModel.save_pretrained` writes, and nothing on failure."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors import safe_open

import subspace_peft
import subspace_peft._io.atomic as atomic
from subspace_peft import (
    SubspaceBasis,
    SubspaceConfig,
    TaskBank,
    bundle_tasks,
    export_lora,
    extract_task,
    extract_tasks,
    migrate_task,
    project_lora,
    save_adapter,
)
from subspace_peft.cards.readme import BEGIN
from subspace_peft.errors import SubspaceError

from .models import bert, inputs, randomise

KINDS: dict[str, dict[str, Any]] = {
    "core": {"mean_gain": "fixed"},
    "factor": {"r": 3},
    "diagonal": {"k": 4},
    "directions": {"mean_gain": "trainable"},
    "none": {"mean_gain": "trainable"},
}
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
EARLIER = "Words of the folder's owner."


@dataclass(frozen=True)
class Trained:
    """A task as it was trained: the model, what it was adapted by, and its folder as PEFT saved it."""

    model: PeftModel
    given: dict[str, Any]
    folder: Path
    logits: torch.Tensor

    @property
    def values(self) -> dict[str, Any]:
        return config(self.folder)


Write = Callable[[Path], Any]


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def stock(task: Trained, scratch: Path) -> Write:
    return task.model.save_pretrained


def unwrapped(task: Trained, scratch: Path) -> Write:
    model = inject_adapter_in_model(SubspaceConfig(**task.given), bert())
    model.load_state_dict(task.model.base_model.model.state_dict())
    return lambda out: save_adapter(model, out)


def bank(task: Trained, scratch: Path) -> Write:
    given = {key: task.given.get(key) for key in ("basis", "k", "save_basis")}
    made = TaskBank(get_peft_model(bert(), SubspaceConfig(**given)))
    made.add("task", task.folder)
    return lambda out: made.save_task("task", out)


def bundle(task: Trained, scratch: Path) -> Write:
    packed = bundle_tasks({"task": task.folder}, scratch / "bundle", progress=False)
    return lambda out: extract_task(packed, "task", out)


def bundle_all(task: Trained, scratch: Path) -> Write:
    packed = bundle_tasks({"task": task.folder}, scratch / "bundle", progress=False)
    return lambda out: extract_tasks(packed, out.parent, progress=False)


def projection(task: Trained, scratch: Path) -> Write:
    export_lora(task.folder, scratch / "lora")
    return project_lora(scratch / "lora", task.given["basis"]).save_pretrained


def migration(task: Trained, scratch: Path) -> Write:
    return migrate_task(task.folder, task.given["basis"]).save_pretrained


# keys of adapter_config.json that may differ from those of the folder that PEFT wrote, per writer: numbers kept as
# cores have other coefficients, and what has no model at hand knows no facts of it
CORES = {"coefficients", "mean_gain", "r"}
WRITERS: dict[Callable[[Trained, Path], Write], set[str]] = {
    stock: set(),
    unwrapped: {"auto_mapping", "card"},
    bank: {*CORES, "auto_mapping", "card"},
    bundle: {*CORES, "bundle"},
    bundle_all: {*CORES, "bundle"},
    projection: {*CORES, "auto_mapping", "base_probe", "base_weights", "card", "k"},
    migration: set(),
}


@pytest.fixture(scope="module")
def trained(bases, tmp_path_factory) -> Callable[[str, bool], Trained]:
    made: dict[tuple[str, bool], Trained] = {}

    def train(kind: str, head: bool) -> Trained:
        if (kind, head) not in made:
            given = {"basis": bases[bert].location, "coefficients": kind, **KINDS.get(kind, {})}
            if kind == "core4":
                # what `diagonal`, with its k, becomes as cores
                given |= {"coefficients": "core", "k": 4}
            if head:
                given |= {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
            model = randomise(get_peft_model(bert(), SubspaceConfig(**given)))
            if head:
                torch.nn.init.normal_(model.base_model.model.classifier.modules_to_save["default"].weight)
            folder = tmp_path_factory.mktemp(f"{kind}-{head}") / "task"
            model.save_pretrained(folder)
            made[kind, head] = Trained(model, given, folder, logits(model))
        return made[kind, head]

    return train


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(inputs()).logits


def tensors(folder: Path) -> dict[str, tuple[str, list[int]]]:
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        pieces = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {key: (piece.get_dtype(), piece.get_shape()) for key, piece in pieces.items()}


@pytest.mark.parametrize("head", [False, True], ids=["alone", "head"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer_writes_the_folder_that_peft_writes(writer, kind, head, trained, tmp_path):
    task, out = trained(kind, head), tmp_path / "task"
    if writer is bank and head:
        with pytest.raises(SubspaceError, match=r"trained .*classifier.* as well, which a bank does not hold"):
            writer(task, tmp_path)
        return
    out.mkdir()
    (out / "README.md").write_text(EARLIER)
    writer(task, tmp_path)(out)
    assert {file.name for file in out.iterdir()} == FILES

    readme = (out / "README.md").read_text()
    assert EARLIER in readme and readme.count(BEGIN) == 1 and "base_model" in readme
    assert '"./task"' in readme and str(tmp_path) not in readme and task.values["basis_fingerprint"] in readme

    found = config(out)
    if writer is projection:
        # what has no model at hand has no record of its weights, and says nothing of them
        assert "base_weights" not in found
        found["base_weights"] = None
    assert found.keys() == task.values.keys()
    assert {key for key in found if found[key] != task.values[key]} <= WRITERS[writer]
    assert found["inference_mode"] is True and found["subspace_version"] == subspace_peft.__version__
    as_core = found["coefficients"] == "core" and found["mean_gain"] == "none"
    assert as_core or not WRITERS[writer] >= CORES

    like = task if found["coefficients"] == kind else trained("core4" if found["k"] else "core", head)
    assert tensors(out) == tensors(like.folder)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(bert(), out)), task.logits, atol=1e-5, rtol=1e-4)


# PEFT itself writes the stock folder, and not aside
@pytest.mark.parametrize("writer", [writer for writer in WRITERS if writer is not stock])
def test_a_full_disk_leaves_the_folder_as_it_was(writer, trained, tmp_path, monkeypatch):
    out = tmp_path / "task"
    write = writer(trained("core", False), tmp_path)
    shutil.copytree(trained("factor", True).folder, out)
    (out / "notes.txt").write_text(EARLIER)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    fsync, calls, good = os.fsync, [], 0

    def full_disk(handle: int) -> None:
        calls.append(handle)
        if len(calls) > good:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(atomic.os, "fsync", full_disk)
    for good in range(10):  # noqa: B007  `full_disk` uses it
        calls.clear()
        try:
            write(out)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            assert {file.name: file.read_bytes() for file in out.iterdir()} == before
        else:
            break
    assert 3 <= good < 9  # each of the three files, at least, was refused once
    assert {file.name for file in out.iterdir()} == {*FILES, "notes.txt"}
    good = 0
    calls.clear()
    fresh = tmp_path / "new" / "task"
    with pytest.raises(OSError, match="No space"):
        write(fresh)
    assert not fresh.exists()


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_in_the_folders_place_is_left_alone(writer, trained, tmp_path):
    out = tmp_path / "task"
    write = writer(trained("core", False), tmp_path)
    out.write_text(EARLIER)
    with pytest.raises((SubspaceError, ValueError), match=r"is a file|not a file"):
        write(out)
    assert out.read_text() == EARLIER


@pytest.mark.parametrize("writer", WRITERS)
def test_a_basis_that_is_stored_nowhere_is_carried_or_refused(writer, bases, tmp_path):
    given = {"basis": SubspaceBasis(dict(bases[bert].items()), bases[bert].info), "save_basis": True}
    model = randomise(get_peft_model(bert(), SubspaceConfig(**given)))
    model.save_pretrained(tmp_path / "stock")
    task = Trained(model, given, tmp_path / "stock", logits(model))
    if writer in (stock, unwrapped):
        writer(task, tmp_path)(tmp_path / "task")
        assert config(tmp_path / "task")["basis_modules"] and tensors(tmp_path / "task") == tensors(task.folder)
    else:
        with pytest.raises(SubspaceError, match=r"basis.save_pretrained|save that basis by itself"):
            writer(task, tmp_path)(tmp_path / "task")
        assert not (tmp_path / "task").exists()
