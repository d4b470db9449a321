"""What is no bundle, cannot be packed or cannot be loaded, and is said so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftMixedModel, PeftModel, get_peft_model
from safetensors.torch import save_file

from subspace_peft import (
    SubspaceConfig,
    TaskBank,
    build_basis,
    bundle_tasks,
    extract_task,
    extract_tasks,
    load_task,
    open_bundle,
    project_lora,
)
from subspace_peft.bundle.format import BUNDLE_FILE, check_name
from subspace_peft.cli import main
from subspace_peft.errors import BadFileError, BasisMismatchError, SubspaceError

from ..models import bert
from .conftest import logits, rewrite, save


@pytest.mark.parametrize(
    "name", ["../up", "a/b", "..", ".", "", "/etc", "a\\b", "C:x", ".hidden", "x\0y", "__base__", "a" * 201, " x", 7]
)
def test_names_that_are_no_folders_are_refused_both_ways(name, bundle, folders, tmp_path):
    with pytest.raises(SubspaceError, match="cannot be a task's name"):
        bundle_tasks({name: folders[0]}, tmp_path / "no", progress=False)
    assert not (tmp_path / "no").exists()

    def put(header, index):
        index["tasks"][0] = name
        index["entries"][name] = index["entries"].pop("task0")

    rewrite(Path(bundle.location), put)
    with pytest.raises(BadFileError, match=r"cannot be a task's name|KeyError"):
        extract_tasks(bundle.location, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    assert check_name("billing v2") == "billing v2"


def claim(key, value):
    return lambda header, index: header["cores"].__setitem__(key, value)


DAMAGE = {
    "terabytes of cores": (claim("shape", [10**9, 144]), "claims"),
    "terabytes that add up": (
        lambda header, index: header["cores"].update(shape=[10**9, 144], data_offsets=[0, 4 * 144 * 10**9]),
        "claims",
    ),
    "negative sizes": (claim("shape", [-1, -144]), "whole numbers"),
    "overflowing offsets": (claim("data_offsets", [0, 2**70]), "claims"),
    "another dtype": (claim("dtype", "F8_E4M3"), "F8_E4M3"),
    "too few rows": (lambda header, index: index["tasks"].pop(), "cores has shape"),
    "a name twice": (lambda header, index: index["tasks"].__setitem__(1, "task0"), "one name"),
    "no entry": (lambda header, index: index["entries"].pop("task1"), "task1"),
    "no hash": (lambda header, index: index["entries"]["task1"].pop("sha256"), "sha256"),
    "no basis": (lambda header, index: index.pop("basis_fingerprint"), "basis_fingerprint"),
    "negative modules": (
        lambda header, index: index["modules"].update({name: [-6, -6] for name in index["modules"]}),
        "sizes",
    ),
    "other modules": (lambda header, index: index["modules"].popitem(), "cores has shape"),
    "a core too short": (
        lambda header, index: header["0/core"].update(shape=[35], data_offsets=[0, 140]),
        "core of shape",
    ),
    "a newer format": (lambda header, index: index.update(format_version=2), "format version 2"),
    "modules of a task": (
        lambda header, index: index["entries"]["task4"].update(modules=7),
        "AttributeError|TypeError",
    ),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_headers_that_lie_are_refused_before_anything_is_allocated(how, bundle):
    change, message = DAMAGE[how]
    rewrite(Path(bundle.location), change)
    with pytest.raises(BadFileError, match=message):
        open_bundle(bundle.location)


@pytest.mark.parametrize("how", ["length", "half a header", "half the data", "no bundle", "a bank", "empty"])
def test_files_that_are_no_bundles(how, bundle, folders, bases, tmp_path):
    file = Path(bundle.location) / BUNDLE_FILE
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    if how == "a bank":
        TaskBank(get_peft_model(bert(), SubspaceConfig(basis=bases[bert].location))).save(file, overwrite=True)
    else:
        given = {
            "length": (10**12).to_bytes(8, "little") + data[8:],
            "half a header": data[: header // 2],
            "empty": b"",
            "half the data": data[: (header + len(data)) // 2],
            "no bundle": (folders[0] / "adapter_model.safetensors").read_bytes(),
        }
        file.write_bytes(given[how])
    with pytest.raises(BadFileError, match=r"bundle|bank"):
        open_bundle(bundle.location)


def test_a_damaged_task_is_refused_and_the_others_are_read(bundle):
    file = Path(bundle.location) / BUNDLE_FILE
    for name in ("task2", "task3"):
        data = bytearray(file.read_bytes())
        data[bundle.span(name)[1] - 1] ^= 1
        file.write_bytes(bytes(data))
    found = open_bundle(bundle.location)
    model = load_task(bert(), found, "task0")
    for name in ("task2", "task3"):
        with pytest.raises(BadFileError, match=f"'{name}' has sha256"):
            load_task(model, found, name)
    assert set(found.verify()) == {"task2", "task3"} and list(model.peft_config) == ["task0"]
    assert main(["bundle", "ls", bundle.location, "--verify"]) == 1


def test_what_cannot_be_packed(folders, fleets, bases, tmp_path, bundle):
    build_basis(fleets[bert][:3], k=4, progress=False).save_pretrained(tmp_path / "other")
    stranger = save(bert, tmp_path / "stranger", str(tmp_path / "other"))
    own = save(bert, tmp_path / "own", bases[bert].location, save_basis=True)
    memory = build_basis(fleets[bert][:3], k=5, progress=False)
    (tmp_path / "twin").mkdir()
    twin = save(bert, tmp_path / "twin" / "task0", bases[bert].location)
    nan = {module: core * float("nan") for module, core in project_lora(fleets[bert][0], bases[bert]).cores.items()}
    projection = project_lora(fleets[bert][0], bases[bert])
    projection.cores.update(nan)
    cases = [
        ([], "at least one task"),
        ([folders[0], stranger], "'stranger' is on the basis"),
        ([folders[0], twin], "Two tasks are called 'task0'"),
        ([own], "carries its basis"),
        ([project_lora(fleets[bert][0], memory)], "has to be stored"),
        ([fleets[bert][0]], "not SUBSPACE"),
        ([tmp_path / "nowhere"], "nowhere"),
        ([bert()], "got Bert"),
        ([projection], "NaN"),
        ({"x": bundle}, "got Bundle"),
    ]
    for tasks, message in cases:
        with pytest.raises(SubspaceError, match=message):
            bundle_tasks(tasks, tmp_path / "no", progress=False)
    with pytest.raises(SubspaceError, match="no task has that name"):
        bundle_tasks([folders[0]], tmp_path / "no", metrics={"nobody": {}}, progress=False)
    with pytest.raises(SubspaceError, match="not JSON"):
        bundle_tasks([folders[0]], tmp_path / "no", metrics={"task0": {"loss": float("nan")}}, progress=False)
    with pytest.raises(SubspaceError, match="stored as floats"):
        bundle_tasks([folders[0]], tmp_path / "no", dtype=torch.int8, progress=False)
    assert not (tmp_path / "no").exists()
    # said where its basis is, a self-contained task can be packed, too
    made = bundle_tasks([own], tmp_path / "yes", basis=bases[bert].location, progress=False)
    expected = logits(PeftModel.from_pretrained(bert(), own))
    torch.testing.assert_close(logits(load_task(bert(), made, "own")), expected, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_loaded(bundle, fleets, bases, tmp_path):
    with pytest.raises(SubspaceError, match=r"no task 'nobody'.*task0"):
        load_task(bert(), bundle.location, "nobody")
    with pytest.raises(SubspaceError, match="no bundle"):
        load_task(bert(), tmp_path, "task0")
    model = load_task(bert(), bundle, "task0")
    with pytest.raises(SubspaceError, match="'task0' already"):
        load_task(model, bundle, "task0")
    lora = PeftModel.from_pretrained(bert(), fleets[bert][0])
    with pytest.raises(SubspaceError, match=r"LORA.*as_lora=True"):
        load_task(lora, bundle, "task0")
    load_task(lora, bundle, "task0", as_lora=True)
    mixed = PeftMixedModel.from_pretrained(bert(), fleets[bert][0])
    assert set(load_task(mixed, bundle, "task0").peft_config) == {"default", "task0"}
    other = build_basis(fleets[bert][:3], k=4, progress=False)
    with pytest.raises(BasisMismatchError, match=bases[bert].fingerprint):
        load_task(bert(), bundle, "task0", basis=other)
    copy = bases[bert].save_pretrained(tmp_path / "copy")
    assert load_task(bert(), bundle, "task0", basis=copy).peft_config["task0"].basis == str(copy)
    with pytest.raises(SubspaceError, match="is a file"):
        extract_task(bundle, "task0", Path(bundle.location) / BUNDLE_FILE)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}], ids=["none", "pytorch's"])
def test_another_programs_file_is_said_to_be_one(metadata, tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors", metadata=metadata)
    with pytest.raises(BadFileError, match="another safetensors file, without a bundle's index of tasks"):
        open_bundle(tmp_path / "model.safetensors")
