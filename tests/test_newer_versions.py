"""Files of a newer version of this package name it, the version, and what is not known here: never another package."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from subspace_peft import SubspaceBasis, SubspaceConfig, TaskBank, bundle_tasks, project_lora
from subspace_peft._version import __version__
from subspace_peft.bundle import open_bundle
from subspace_peft.cli import main
from subspace_peft.errors import SubspaceError

from .models import bert

HINT = f"It was written by subspace-peft 99.1, and this is {re.escape(__version__)}: install a newer one"


def edit(file: Path, **values) -> None:
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, **values}))


def edit_index(file: Path, **values) -> None:
    """Change the index in a bundle's or bank's metadata."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    index = json.loads(header["__metadata__"]["bank"])
    header["__metadata__"]["bank"] = json.dumps({**index, **values})
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.fixture
def task(fleets, bases, tmp_path):
    return project_lora(fleets[bert][0], bases[bert]).save_pretrained(tmp_path / "task")


NEWER = {"subspace_version": "99.1", "peft_version": "0.1"}


def test_unknown_fields_of_a_newer_task_are_named_and_ignored(task):
    edit(task / "adapter_config.json", **NEWER, new_gate=0.5, new_names=["a"], unused=None)
    with pytest.warns(UserWarning, match=f"new_gate, new_names not known here, and ignored.*{HINT}") as warned:
        PeftModel.from_pretrained(bert(), task)
    assert not [each for each in warned if "install -U peft" in str(each.message)]


@pytest.mark.parametrize("read", [PeftConfig.from_pretrained, lambda folder: bert().load_adapter(str(folder))])
def test_other_loaders_name_this_package_too(task, read):
    edit(task / "adapter_config.json", **NEWER, new_gate=0.5)
    with pytest.warns(UserWarning, match=f"new_gate not known here, and ignored.*{HINT}") as warned:
        read(task)
    assert not [each for each in warned if "install -U peft" in str(each.message)]
    edit(task / "adapter_config.json", new_gate=None, coefficients="braided")
    with pytest.raises(SubspaceError, match=f"braided.*{HINT}"):
        read(task)


def test_a_newer_task_without_unknown_fields_says_nothing(task):
    edit(task / "adapter_config.json", **NEWER, unused=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SubspaceConfig.from_pretrained(str(task))


@pytest.mark.parametrize(
    "values",
    [{"coefficients": "novel"}, {"alpha": "auto"}, {"peft_type": "SUBSPACE_2"}, {"target_modules": 7}],
    ids=str,
)
def test_values_that_only_a_newer_version_knows(values, task, capsys):
    edit(task / "adapter_config.json", **NEWER, **values)
    for load in (SubspaceConfig.from_pretrained, lambda place: PeftModel.from_pretrained(bert(), place)):
        if "peft_type" in values and load != SubspaceConfig.from_pretrained:
            continue  # PEFT reads the kind by itself
        with pytest.raises((SubspaceError, TypeError), match=HINT) as refused:
            load(str(task))
        assert "install -U peft" not in str(refused.value)
    assert main(["export-lora", str(task), "--out", str(task.parent / "out")]) == 1
    assert re.search(HINT, capsys.readouterr().err)


def test_tensors_that_only_a_newer_version_knows(task):
    edit(task / "adapter_config.json", **NEWER)
    file = task / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(
        {key.replace("subspace_coef.weight", "subspace_coef.novel"): each for key, each in tensors.items()}, file
    )
    with pytest.raises(SubspaceError, match=HINT):
        SubspaceConfig.from_pretrained(str(task))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"format_version": 3, "subspace_peft_version": "99.1"}, HINT),
        ({"format_version": 3, "subspace_peft_version": None}, "written by a newer subspace-peft than this"),
        ({"precision": {"stored": "int2"}, "subspace_peft_version": "99.1"}, HINT),
    ],
    ids=["format", "format alone", "precision"],
)
def test_a_newer_basis(values, said, basis_folder, capsys):
    edit(basis_folder / "basis_config.json", **values)
    with pytest.raises(SubspaceError, match=said):
        SubspaceBasis.from_pretrained(basis_folder)
    assert main(["inspect", str(basis_folder)]) == 1
    assert "install a newer one from a checkout" in capsys.readouterr().err


def test_a_newer_bundle_and_bank(task, bases, tmp_path):
    bundle_tasks([task], tmp_path / "bundle", progress=False)
    edit_index(tmp_path / "bundle" / "bundle.safetensors", format_version=9, subspace_peft_version="99.1")
    with pytest.raises(SubspaceError, match=HINT):
        open_bundle(tmp_path / "bundle")
    bank = TaskBank(get_peft_model(bert(), SubspaceConfig(basis=bases[bert].location)))
    file = bank.save(tmp_path / "bank.safetensors")
    edit_index(file, format_version=9, subspace_peft_version="99.1")
    with pytest.raises(SubspaceError, match=HINT):
        bank.load(file)


def test_a_newer_basis_as_a_build_file(basis_folder, tmp_path, capsys):
    file = basis_folder / "basis_config.json"
    config = json.loads(file.read_text())
    edit(file, build={**config["build"], "novel": 3}, subspace_peft_version="99.1")
    assert main(["build", "--config", str(basis_folder), "--out", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert "'novel'" in err and re.search(HINT, err)
