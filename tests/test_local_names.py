"""What is a folder of this machine by its name is never asked of a server: ways of loading × what is recorded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from subspace_peft import (
    SubspaceBasis,
    SubspaceConfig,
    TaskBank,
    build_basis,
    bundle_tasks,
    export_lora,
    hotswap,
    load_adapter,
    load_task,
    open_bundle,
    project_lora,
)
from subspace_peft.basis import resolve_basis
from subspace_peft.basis.recorded import recorded_place
from subspace_peft.cli.main import main
from subspace_peft.errors import BasisNotFoundError, SubspaceError
from subspace_peft.hub import looks_like_path, only_local
from subspace_peft.tasks.push import push_saved_task
from subspace_peft.tasks.read import read_task

from .faulty_hub import FaultyHub, point_here
from .models import bert, randomise


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[FaultyHub]:
    with FaultyHub() as server:
        point_here(monkeypatch, server.url, str(tmp_path / "hub"))
        yield server


@pytest.fixture
def here(bases, tmp_path, monkeypatch) -> Path:
    """A working directory with a task in `my-task`, its basis in `my-basis`, and nothing known of either."""
    folder = tmp_path / "here"
    shutil.copytree(str(bases[bert].location), folder / "my-basis")
    monkeypatch.chdir(folder)
    base = bert()
    base.save_pretrained("base")
    base = AutoModelForSequenceClassification.from_pretrained("base")
    model = randomise(get_peft_model(base, SubspaceConfig(basis="my-basis")))
    model.save_pretrained("my-task")
    bundle_tasks(["my-task"], "my-bundle", progress=False)
    # no other way to the basis: as in a new process on another machine
    monkeypatch.setattr("subspace_peft.basis.resolve.alive", lambda _: None)
    monkeypatch.setattr("subspace_peft.basis.recorded.alive", lambda _: None)
    monkeypatch.setenv("SUBSPACE_PEFT_CACHE", str(tmp_path / "empty"))
    return folder


def record(folder: Path, basis: Any, **more: Any) -> None:
    file = folder / "my-task" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "basis": basis, **more}))


def stock(task: str) -> None:
    PeftModel.from_pretrained(bert(), task)


def further(task: str) -> None:
    PeftModel.from_pretrained(bert(), task).load_adapter(task, "more")


def native(task: str) -> None:
    AutoModelForSequenceClassification.from_pretrained("base").load_adapter(task)


def banked(task: str) -> None:
    TaskBank(get_peft_model(bert(), SubspaceConfig(basis="./my-basis"))).add("one", task)


def swapped(task: str) -> None:
    hotswap(get_peft_model(bert(), SubspaceConfig(basis="./my-basis")), task)


def command(*arguments: str) -> None:
    if main(list(arguments)):
        raise SubspaceError("the command failed")


LOADERS: dict[str, Callable[[str], Any]] = {
    "stock": stock,
    "further": further,
    "transformers": native,
    "load_adapter": lambda task: load_adapter(bert(), task),
    "read_task": read_task,
    "config": lambda task: SubspaceConfig.from_pretrained(task).resolve(),
    "bank": banked,
    "hotswap": swapped,
    "export_lora": lambda task: export_lora(task, "exported"),
    "bundle": lambda task: bundle_tasks([task], "packed", progress=False),
    "inspect": lambda task: command("inspect", task),
    "export-lora": lambda task: command("export-lora", task, "--out", "lora"),
}
# what a task in `my-task` says of its basis, by this version and by earlier ones → whether it is there
RECORDED: dict[str, bool] = {
    "../my-basis": True,
    "./my-basis": True,
    "my-basis": True,
    "gone": False,
    "../gone": False,
    "./gone": False,
    "my-task/gone": False,
    "my-basis/gone": False,
    "~/gone": False,
    "a/b/gone": False,
    "gone\\basis": False,
    "/gone/my-basis": True,  # where the two were moved together
    "/gone/elsewhere": False,
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("recorded", ["../my-basis", "my-basis", "my-task/gone", "gone"])
def test_a_local_task_asks_no_server(hub, here, loader, recorded):
    record(here, recorded)
    # a model on that basis is at hand: this machine has seen it
    if RECORDED[recorded] or loader in ("bank", "hotswap"):
        LOADERS[loader]("my-task")
    else:
        with pytest.raises(SubspaceError):
            LOADERS[loader]("my-task")
    assert hub.log == []


@pytest.mark.parametrize("recorded", RECORDED)
def test_every_kind_of_record_asks_no_server_and_says_where_it_looked(hub, here, recorded):
    record(here, recorded)
    if RECORDED[recorded]:
        assert SubspaceConfig.from_pretrained("my-task").resolve().location == str(here / "my-basis")
    else:
        with pytest.raises(BasisNotFoundError, match="was not found") as caught:
            SubspaceConfig.from_pretrained("my-task").resolve()
        assert "There is no folder" in str(caught.value)
    assert hub.log == []


def test_the_places_are_tried_in_order_and_listed(hub, here, tmp_path):
    record(here, "./gone")
    with pytest.raises(BasisNotFoundError) as caught:
        SubspaceConfig.from_pretrained("my-task").resolve()
    said = str(caught.value)
    places = [str(each / "gone") for each in (here / "my-task", here)]
    assert [said.index(f"{place}:") for place in places] == sorted(said.index(f"{place}:") for place in places)
    for at in (here / "my-task", here):
        shutil.copytree(here / "my-basis", at / "gone")
        assert SubspaceConfig.from_pretrained(str(here / "my-task")).resolve().location == str(at / "gone")
        shutil.rmtree(at / "gone")


@pytest.mark.parametrize(("recorded", "revision"), [("org/basis", "main"), ("org/basis", None), ("basis", "main")])
def test_what_is_recorded_as_a_hub_id_is_asked_of_the_hub(hub, here, recorded, revision):
    hub.put("org/basis", here / "my-basis")
    record(here, recorded, basis_revision=revision)
    if recorded == "org/basis":
        assert SubspaceConfig.from_pretrained("my-task").resolve().location == "org/basis"
    else:
        with pytest.raises(BasisNotFoundError):
            SubspaceConfig.from_pretrained("my-task").resolve()
    assert hub.log


def test_a_hub_id_is_asked_for_where_a_folder_has_its_first_part(hub, here):
    hub.put("my-task/basis", here / "my-basis")
    record(here, "my-task/basis", basis_revision="main")
    assert SubspaceConfig.from_pretrained("my-task").resolve().location == "my-task/basis"


def test_a_bundle_of_this_machine_asks_no_server(hub, here):
    config = json.loads(json.dumps(open_bundle("my-bundle").index["config"]))
    assert config["basis"] == "../my-basis"
    load_task(bert(), "my-bundle", "my-task")
    command("bundle", "ls", "my-bundle")
    assert hub.log == []


# -- names that are typed ---------------------------------------------------------------------------------------------

TYPED = ["gone", "./gone", "../gone", "~/gone", "/gone/x", "a/b/c", "gone\\x", "my-basis/gone", "org/gone.safetensors"]
CALLS: dict[str, Callable[[str], Any]] = {
    "basis": SubspaceBasis.from_pretrained,
    "resolve": resolve_basis,
    "config": lambda name: SubspaceConfig(basis=name).resolve(),
    "task": SubspaceConfig.from_pretrained,
    "read_task": read_task,
    "load_adapter": lambda name: load_adapter(bert(), name),
    "build": lambda name: build_basis([name], k=2, progress=False),
    "project": lambda name: project_lora(name, "my-basis"),
    "bundle": open_bundle,
    "push": lambda name: push_saved_task(name, "me/task"),
    "inspect": lambda name: command("inspect", name),
    "validate": lambda name: command("validate", name),
    "base model": lambda name: command("record-base", "my-basis", "--base-model", name),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_typed_name_that_is_a_path_by_its_look_asks_no_server(hub, here, call, capsys):
    # a base model's id may be a single name
    for name in TYPED if call != "base model" else TYPED[1:]:
        with pytest.raises(SubspaceError):
            CALLS[call](name)
        assert hub.log == [], name


@pytest.mark.parametrize("call", ["basis", "config", "task", "build", "bundle", "inspect"])
def test_a_typed_hub_id_is_asked_for(hub, here, call, capsys):
    with pytest.raises(ValueError, match=r"org/none|command"):
        CALLS[call]("org/none")
    assert hub.log


@pytest.mark.parametrize(
    ("text", "revision", "local"),
    [
        ("org/name", None, False),
        ("org/name@main", None, False),
        ("org/name:folder/inside", None, False),
        ("org/name:file.safetensors", None, False),
        ("org/name.v1", None, False),
        ("folder/name", None, True),
        ("bank/name", None, True),
        ("folder/name@main", None, False),
        ("folder/name", "main", False),
        ("name", None, True),
        ("name", "main", False),
        ("./folder/name", "main", True),
        ("C:/folder/name", None, True),
        ("org/file.json", None, True),
    ],
)
def test_what_may_be_asked_of_the_hub(tmp_path, monkeypatch, text, revision, local):
    (tmp_path / "folder").mkdir()
    (tmp_path / "bank").write_text("a file")
    monkeypatch.chdir(tmp_path)
    assert only_local(text, revision) == local
    assert local or not looks_like_path(text)


@pytest.mark.parametrize(
    ("location", "revision", "fingerprint", "written"),
    [
        ("org/basis", "a" * 40, "f" * 64, ("org/basis", "f" * 64)),
        ("org/basis", None, "f" * 64, ("org/basis", "f" * 64)),
        ("/gone/basis", None, "f" * 64, (None, "f" * 64)),
        ("/gone/basis", None, None, ("./basis", None)),
        ("../gone", None, "f" * 64, (None, "f" * 64)),
        ("../gone", None, None, ("../gone", None)),
        (None, None, "f" * 64, (None, "f" * 64)),
    ],
)
def test_what_is_recorded_tells_a_folder_from_a_hub_id(tmp_path, location, revision, fingerprint, written):
    assert recorded_place(location, revision, fingerprint, folder=tmp_path, near=None) == written


def test_a_basis_that_is_found_is_recorded_by_its_relative_path(bases, here, monkeypatch, tmp_path):
    for given in ("my-basis", "./my-basis", str(here / "my-basis")):
        SubspaceConfig(basis=given).save_pretrained("wish")
        assert json.loads(Path("wish/adapter_config.json").read_text())["basis"] == "../my-basis"
    # the working directory has changed since
    model = get_peft_model(bert(), SubspaceConfig(basis="my-basis"))
    monkeypatch.chdir(tmp_path)
    model.save_pretrained(here / "later")
    assert json.loads((here / "later" / "adapter_config.json").read_text())["basis"] == "../my-basis"
