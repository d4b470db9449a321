"""No path of the machine in what may be shared: every writer's files, byte by byte, and what is moved still loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file

from subspace_peft import (
    SubspaceBasis,
    SubspaceConfig,
    TaskBank,
    build_basis,
    bundle_tasks,
    compress_fleet,
    export_lora,
    extract_task,
    load_task,
    migrate_bundle,
    migrate_task,
    open_bundle,
    project_lora,
    save_adapter,
    update_basis,
)
from subspace_peft._io.places import is_absolute, last_part, relative_place
from subspace_peft.builders.rebuild import rebuild_basis
from subspace_peft.cli.main import main
from subspace_peft.errors import BasisNotFoundError

from .models import bert, inputs, randomise, train_lora


class Place:
    """A fleet, a basis of it and a task in that basis, all of which this test may move."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loras = [str(train_lora(bert, folder / "loras" / f"l{n}", seed=20 + n)) for n in range(4)]
        self.basis = build_basis(self.loras, k=4, progress=False)
        self.basis.save_pretrained(folder / "basis")
        self.model = randomise(get_peft_model(bert(), SubspaceConfig(basis=str(folder / "basis"))))
        self.task = folder / "task"
        self.model.save_pretrained(self.task)
        self.bundle = bundle_tasks([self.task], folder / "bundle", progress=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUBSPACE_PEFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return Place(tmp_path_factory.mktemp("secret-machine"))


def command(*arguments: Any) -> None:
    assert main([str(each) for each in arguments]) == 0


def trained(place: Place, out: Path) -> None:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    rows = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 4, "labels": [0, 1, 0, 1]})
    model = get_peft_model(bert(), SubspaceConfig(basis=str(place.folder / "basis"), task_type="SEQ_CLS"))
    given = {"report_to": [], "save_steps": 1, "max_steps": 2, "use_cpu": True, "disable_tqdm": True}
    Trainer(model, TrainingArguments(str(out), **given), train_dataset=rows).train()
    # torch's own: arguments and states, which name the output folder and are no part of the task
    for file in [*out.rglob("training_args.bin"), *out.rglob("trainer_state.json"), *out.rglob("*.pt*")]:
        file.unlink()


def injected(place: Place, out: Path) -> None:
    model = inject_adapter_in_model(SubspaceConfig(basis=str(place.folder / "basis")), bert())
    save_adapter(model, out)


def banked(place: Place, out: Path) -> None:
    bank = TaskBank(get_peft_model(bert(), SubspaceConfig(basis=str(place.folder / "basis"))))
    bank.add("one", place.task)
    bank.save_task("one", out / "task")
    bank.save(out / "bank.safetensors")


def updated(place: Place, out: Path) -> None:
    more = train_lora(bert, place.folder / "loras" / "more", seed=40)
    new = update_basis(place.folder / "basis", [str(more)], progress=False)
    new.save_pretrained(out / "basis")
    migrate_task(place.task, new).save_pretrained(out / "task")
    migrate_bundle(place.bundle, new, out / "bundle")


def from_bundle(place: Place, out: Path) -> None:
    extract_task(place.bundle, "task", out / "task")
    extract_task(place.bundle, "task", out / "lora", as_lora=True)
    load_task(bert(), place.bundle, "task").save_pretrained(out / "loaded")


def skipped(place: Place, out: Path) -> None:
    bad = place.folder / "bad"
    bad.mkdir(exist_ok=True)
    given = [*place.loras, str(bad), "/no/such/lora"]
    weights = {place.loras[0]: 2.0}
    build_basis(given, k=3, skip_bad=True, weights=weights, progress=False).save_pretrained(out)


def built_here(place: Place, out: Path) -> None:
    before = os.getcwd()
    os.chdir(place.folder)
    try:
        build_basis(["loras/l0", "./loras/l1"], k=3, progress=False).save_pretrained(out)
    finally:
        os.chdir(before)


# writer → what it writes into a folder
WRITERS: dict[str, Callable[[Place, Path], Any]] = {
    "basis": lambda place, out: place.basis.save_pretrained(out),
    "basis, copied": lambda place, out: SubspaceBasis.from_pretrained(place.folder / "basis").save_pretrained(out),
    "basis of relative places": built_here,
    "basis with bad sources": skipped,
    "basis, stored low": lambda place, out: place.basis.to_precision("int8").save_pretrained(out),
    "task": lambda place, out: place.model.save_pretrained(out),
    "task of a config": lambda place, out: SubspaceConfig(basis=str(place.folder / "basis")).save_pretrained(out),
    "task of a basis": lambda place, out: get_peft_model(bert(), SubspaceConfig(basis=place.basis)).save_pretrained(
        out
    ),
    "task, loaded": lambda place, out: PeftModel.from_pretrained(bert(), place.task).save_pretrained(out),
    "task, self-contained": lambda place, out: get_peft_model(
        bert(), SubspaceConfig(basis=place.basis, save_basis=True)
    ).save_pretrained(out),
    "trainer": trained,
    "injected": injected,
    "bank": banked,
    "projection": lambda place, out: project_lora(place.loras[0], place.folder / "basis").save_pretrained(out),
    "bundle": lambda place, out: bundle_tasks([place.task], out, progress=False),
    "compressed": lambda place, out: compress_fleet(
        place.loras, place.folder / "basis", out, min_energy=0.1, progress=False
    ),
    "extracted": from_bundle,
    "migrated": updated,
    "lora": lambda place, out: export_lora(place.task, out),
    "build": lambda place, out: command("build", *place.loras, "--out", out, "-k", 3, "--quiet"),
    "project": lambda place, out: command("project", place.loras[0], "--basis", place.folder / "basis", "--out", out),
    "report": lambda place, out: command("report", place.folder / "basis", "--out", out, "--quiet"),
}


def bytes_of(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.parametrize("beside", [True, False], ids=["beside", "elsewhere"])
@pytest.mark.parametrize("writer", WRITERS)
def test_no_writer_says_where_on_this_machine_it_wrote(writer, beside, place, tmp_path_factory):
    out = (place.folder / "out" if beside else tmp_path_factory.mktemp("out") / "a" / "b" / "c") / writer.split()[0]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    WRITERS[writer](place, out)
    written = bytes_of(out)
    assert written
    for name, data in written.items():
        for secret in (place.folder, place.folder.parent, Path.home(), out, Path.cwd()):
            assert f"{secret}/".encode() not in data and f'{secret}"'.encode() not in data, (name, secret)
        assert b"/no/such" not in data
    places = [json.loads(data).get("basis") for name, data in written.items() if name.endswith("adapter_config.json")]
    # what a basis is written with goes with it
    near = beside or writer == "migrated"
    assert all(each is None or each.startswith("../") == near for each in places), places


@pytest.mark.parametrize(
    ("there", "here", "written"),
    [
        ("a/basis", "a/task", "../basis"),
        ("a/basis", "a/task/checkpoint-5", "../../basis"),
        ("a/task/basis", "a/task", "./basis"),
        ("a/task", "a/task", "."),
        ("b/basis", "a/task", "../../b/basis"),
        ("b/1/2/3/basis", "a/task", None),
        ("b/basis", "a/1/2/3/task", None),
    ],
)
def test_a_place_is_relative_where_both_belong_together(tmp_path, there, here, written):
    assert relative_place(tmp_path / there, tmp_path / here) == written
    if written is not None:
        assert os.path.normpath(tmp_path / here / written) == str(tmp_path / there)


def test_a_place_names_no_user(monkeypatch, tmp_path):
    home = tmp_path / "home" / "me"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(Path, "home", lambda: home)
    assert relative_place(home / "basis", home / "task") == "../basis"
    assert relative_place(home / "basis", tmp_path / "task") is None
    assert relative_place(tmp_path / "home" / "you" / "basis", home / "task") is None
    assert relative_place("/basis", "/task") is None


@pytest.mark.parametrize(
    ("place", "absolute", "last"),
    [
        ("/home/me/basis", True, "basis"),
        ("~/basis", True, "basis"),
        ("C:\\me\\basis", True, "basis"),
        ("C:/me/basis", True, "basis"),
        ("\\\\server\\basis", True, "basis"),
        ("org/basis", False, "basis"),
        ("../basis", False, "basis"),
        ("basis", False, "basis"),
    ],
)
def test_paths_of_every_system_are_known(place, absolute, last):
    assert (is_absolute(place), last_part(place)) == (absolute, last)


# -- what is moved ----------------------------------------------------------------------------------------------------


@pytest.fixture
def moved(place, tmp_path, monkeypatch) -> Path:
    """Everything in another folder, on another machine."""
    shutil.copytree(place.folder, tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "out", ignore_errors=True)
    monkeypatch.setattr("subspace_peft.basis.living._alive", {})
    monkeypatch.setattr("subspace_peft.basis.resolve.alive", lambda _: None)
    monkeypatch.setattr("subspace_peft.basis.recorded.alive", lambda _: None)
    return tmp_path / "moved"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(inputs()).logits


def test_a_task_and_its_basis_move_together(place, moved):
    config = SubspaceConfig.from_pretrained(moved / "task")
    assert config.basis == "../basis" and config.resolve().location == str((moved / "basis").resolve())
    assert torch.equal(logits(PeftModel.from_pretrained(bert(), moved / "task")), logits(place.model))
    bundled = open_bundle(moved / "bundle")
    assert bundled.config("task").resolve().location == str((moved / "basis").resolve())


def test_a_task_that_moves_alone_is_found_by_this_machines_note(place, moved, tmp_path):
    alone = Path(shutil.move(moved / "task", tmp_path / "x" / "alone"))
    with pytest.raises(BasisNotFoundError, match=str(tmp_path / "x" / "basis")):
        SubspaceConfig.from_pretrained(alone).resolve()
    SubspaceBasis.from_pretrained(place.folder / "basis")
    assert SubspaceConfig.from_pretrained(alone).resolve().location == str(place.folder / "basis")


def test_a_task_of_an_earlier_version_is_loaded_and_moved_with_its_basis(place, moved, tmp_path):
    file = moved / "task" / "adapter_config.json"
    earlier = {**json.loads(file.read_text()), "basis": str(place.folder / "basis")}
    file.write_text(json.dumps(earlier))
    assert SubspaceConfig.from_pretrained(moved / "task").resolve().location == str(place.folder / "basis")
    file.write_text(json.dumps({**earlier, "basis": "/another/machine/basis"}))
    assert SubspaceConfig.from_pretrained(moved / "task").resolve().location == str((moved / "basis").resolve())


def test_a_basis_is_built_again_wherever_it_lies(place, moved, tmp_path):
    together = rebuild_basis(moved / "basis", progress=False)
    assert together == place.basis
    assert all(entry["location"].startswith(str(moved)) for entry in together.info["sources"])
    # far from its sources, by what this machine has noted
    far = tmp_path / "1" / "2" / "3" / "4" / "basis"
    SubspaceBasis.from_pretrained(place.folder / "basis").save_pretrained(far)
    written = json.loads((far / "basis_config.json").read_text())["sources"]
    assert sorted(entry["location"] for entry in written) == ["l0", "l1", "l2", "l3"]
    assert rebuild_basis(far, progress=False) == place.basis
    command("build", "--from-config", far, "--out", tmp_path / "again", "--quiet")
    assert load_file(tmp_path / "again" / "basis.safetensors").keys() == load_file(far / "basis.safetensors").keys()


def test_a_note_that_cannot_be_made_is_said(place, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SUBSPACE_PEFT_CACHE", str(tmp_path / "file"))
    far = tmp_path / "1" / "2" / "3" / "4" / "task"
    with pytest.warns(UserWarning, match="by the fingerprint .* alone.*cannot be written"):
        place.model.save_pretrained(far)
