"""Bundles and banks of earlier versions load through every public door, and are written as they were."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open

from subspace_peft import (
    SubspaceBasis,
    SubspaceConfig,
    TaskBank,
    add_tasks,
    bundle_tasks,
    export_lora,
    extract_tasks,
    load_task,
    migrate_bundle,
    open_bundle,
)
from subspace_peft.cli import main

from .checks import (
    EXPECTED,
    TENSORS,
    VERSIONS,
    WRITTEN_BY,
    agree,
    check,
    close_tensors,
    folders,
    logits_of,
    same_bytes,
)
from .models import outputs


def index_of(file: Path) -> dict[str, Any]:
    """A bundle's or bank's index, without versions and the places that are this machine's."""
    with safe_open(file, "pt") as tensors:
        index = json.loads(tensors.metadata()["bank"])
    index.pop("subspace_peft_version")
    for key in WRITTEN_BY:
        index.get("config", {}).pop(key, None)
    for entry in index.get("entries", {}).values():
        entry["source"]["location"] = Path(entry["source"]["location"]).name
    if "config" in index:
        # far from the basis, its fingerprint alone leads there
        index["config"].pop("basis")
    return index


def earlier(bundle: Any, *names: str) -> Any:
    """A residual was loaded as a LoRA: that it no longer is is said."""
    has = any(bundle[name].extra_rank for name in names)
    return pytest.warns(FutureWarning, match="as a stock LoRA") if has else contextlib.nullcontext()


@pytest.mark.parametrize("folder", folders("bundles"))
def test_a_bundles_tasks_load(base, folder, tmp_path, capsys):
    root = folder.parent.parent
    expected = copy.deepcopy(EXPECTED[root]["bundles"][folder.name])
    bundle = open_bundle(folder)
    assert list(bundle) == list(expected["tasks"])
    assert bundle.fingerprint == expected["fingerprint"]
    assert bundle.verify() == {}
    assert main(["bundle", "ls", str(folder), "--verify", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    for listed in (shown, expected):
        listed["location"] = Path(listed["location"]).name
        for task in listed["tasks"].values():
            task["source"]["location"] = Path(task["source"]["location"]).name
    for task in shown["tasks"].values():
        assert (task.pop("extra_rank") > 0) == (task.pop("own_directions") > 0) == (task["residual_rank"] > 0)
    assert shown == expected
    model = None
    for name in bundle:
        logits = TENSORS[root][f"bundles/{folder.name}/{name}"]
        with earlier(bundle, name):
            agree(outputs(load_task(base(), folder / "bundle.safetensors", name)), logits)
        task = bundle.task(name)
        assert task.config.basis_fingerprint == expected["fingerprint"]
        assert set(task.cores) == set(bundle.sizes(name))
        # several tasks in one model
        model = load_task(base() if model is None else model, bundle, name, f"as-{name}", own_directions=True)
        model.set_adapter(f"as-{name}")
        agree(outputs(model), logits)
        export_lora(task, tmp_path / "lora" / name)
        agree(outputs(PeftModel.from_pretrained(base(), tmp_path / "lora" / name)), logits)
    with earlier(bundle, *bundle):
        written = extract_tasks(folder, tmp_path / "out", progress=False)
    for out in written:
        agree(outputs(PeftModel.from_pretrained(base(), out)), TENSORS[root][f"bundles/{folder.name}/{out.name}"])


@pytest.mark.parametrize("folder", folders("bundles"))
def test_a_bundle_is_added_to_and_migrated(base, folder, tmp_path):
    root = folder.parent.parent
    moved = shutil.copytree(folder, tmp_path / "moved")
    before = open_bundle(folder)
    bundle = add_tasks(moved, {"new": root / "tasks" / "factor"}, basis=root / "bases" / "float32", progress=False)
    assert set(bundle) == {*before, "new"}
    for name in before:
        assert bundle.raw(name) == before.raw(name)
    found, drifts = migrate_bundle(before, root / "bases" / "updated", tmp_path / "migrated", progress=False)
    assert set(drifts) == set(before)
    for name in found:
        logits = TENSORS[root][f"bundles/{folder.name}/{name}"]
        torch.testing.assert_close(outputs(load_task(base(), found, name)), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("root", VERSIONS, ids=lambda root: root.name)
def test_a_bundle_is_packed_again_as_it_was(root, tmp_path):
    folder = root / "bundles" / "plain"
    old = open_bundle(folder)
    tasks = [root / "tasks" / Path(old[name].source["location"]).name for name in old]
    given = {"metrics": {"core": old["core"].metrics}, "id2label": {"k": old["k"].id2label}}
    bundle_tasks(tasks, tmp_path, **given, progress=False)
    new, wanted = index_of(tmp_path / "bundle.safetensors"), index_of(folder / "bundle.safetensors")
    # a product of matrices is in it, whose last bits are the machine's
    new["entries"]["directions"]["sha256"] = wanted["entries"]["directions"]["sha256"]
    assert new == wanted
    close_tensors(tmp_path / "bundle.safetensors", folder / "bundle.safetensors")


@pytest.mark.parametrize("root", VERSIONS, ids=lambda root: root.name)
def test_a_banks_file_and_a_bundle_load_into_a_bank(base, root, tmp_path):
    tasks, file = root / "tasks", root / "bank.safetensors"
    model = PeftModel.from_pretrained(base(), tasks / "core")
    bank = TaskBank(model)
    names = bank.load(file)
    assert names == ["core", "core-mean-fixed", "factor"]
    with bank.tasks(names):
        agree(outputs(model), torch.stack([logits_of(tasks / name)[row] for row, name in enumerate(names)]))
    bank.save(tmp_path / "again.safetensors")
    assert index_of(tmp_path / "again.safetensors") == index_of(file)
    same_bytes(tmp_path / "again.safetensors", file)
    bank.load_adapter("factor")
    model.set_adapter("factor")
    check(model, tasks / "factor")
    for folder in ("bfloat16", "fleet"):
        other = TaskBank(model, "default")
        loaded = other.load(root / "bundles" / folder / "bundle.safetensors", cores_only=True)
        bundle = open_bundle(root / "bundles" / folder)
        assert loaded == list(bundle)
        for name in loaded:
            # residuals are projected on the basis with the core
            exact = {"rtol": 0, "atol": 0} if not bundle.read(name).own else {}
            for module, core in bundle.task(name).without_own().cores.items():
                torch.testing.assert_close(other[name][module], core.float(), **exact)


# -- pickles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", VERSIONS, ids=lambda root: root.name)
def test_pickles_load(root):
    config = pickle.loads((root / "config.pickle").read_bytes())
    assert isinstance(config, SubspaceConfig)
    new = SubspaceConfig(basis="org/basis", basis_revision="main", k=4, target_modules=["query", "value"])
    assert config.to_dict() == new.to_dict()
    assert vars(config).keys() == vars(new).keys()
    for name in ("float32", "int8"):
        basis = pickle.loads((root / f"{name}.pickle").read_bytes())
        full = SubspaceBasis.from_pretrained(root / "bases" / name)
        assert isinstance(basis, SubspaceBasis)
        assert (basis.base_model, basis.precision) == (full.base_model, full.precision)
        for module, digest in basis.digests.items():
            assert digest == full.digests[module]
            for key, value in basis[module].tensors().items():
                torch.testing.assert_close(value, full[module].tensors()[key], atol=1e-6, rtol=1e-6)


def test_no_place_of_another_machine_is_in_the_files():
    for root in VERSIONS:
        for file in filter(Path.is_file, root.rglob("*")):
            data = file.read_bytes()
            assert not any(b"/%b/" % start in data for start in (b"tmp", b"work", b"home", b"root", b"Users")), file
            assert file.suffix not in (".json", ".md") or b'"/' not in data, file
