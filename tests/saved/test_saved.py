"""Files of earlier versions load through every public door with their numbers, and are written as they were.

`make.py` wrote them. A later version whose files are to be kept adds a folder of its own, which these tests find.
"""

from __future__ import annotations

import copy
import gc
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from subspace_peft import (
    ModuleBasis,
    SubspaceBasis,
    SubspaceConfig,
    TaskBank,
    add_tasks,
    bundle_tasks,
    export_lora,
    extract_task,
    extract_tasks,
    hotswap,
    load_adapter,
    load_task,
    migrate_bundle,
    migrate_task,
    open_bundle,
    project_lora,
    save_adapter,
    update_basis,
    write_card,
)
from subspace_peft.cli import main
from subspace_peft.convert import read_task
from subspace_peft.tuner import SubspaceLayer

from ..models import needs_transformers_adapters
from .models import MAKERS, outputs

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
VERSIONS = sorted(Path(__file__).parent.resolve().glob("v*"))
# what `inspect` says of a basis as its config does
COPIED = {"sources", "build", "skipped", "certificates", "energy_kept_per_module", "energy_random_per_module"}
WRITTEN_BY = {"peft_version", "subspace_version", "subspace_peft_version"}


def said(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


EXPECTED = {root: said(root / "expected.json") for root in VERSIONS}
TENSORS = {root: load_file(root / "expected.safetensors") for root in VERSIONS}


def folders(kind: str, fits: Callable[[dict[str, Any]], bool] | None = None) -> list[Any]:
    """Parameters: all folders of a kind, of tasks those whose configuration `fits`."""
    return [
        pytest.param(folder, id=f"{root.name}-{folder.name}")
        for root in VERSIONS
        for folder in sorted((root / kind).iterdir())
        if fits is None or fits(said(folder / CONFIG))
    ]


def trains_more(config: dict[str, Any]) -> bool:
    """Whether the task has trained tensors beside its coefficients."""
    return bool(config["modules_to_save"] or config["bias"] != "none" or config["trainable_token_indices"])


def stored(config: dict[str, Any]) -> bool:
    """Whether the task's basis lies in a folder."""
    return config["basis_modules"] is None


def plain(config: dict[str, Any]) -> bool:
    return not trains_more(config)


def whole(config: dict[str, Any]) -> bool:
    """Whether the task adapts all modules of its stored basis, with all directions, and nothing else."""
    some = config["k"] or config["rank_pattern"] or config["exclude_modules"] or config["layers_to_transform"]
    return stored(config) and plain(config) and not some and config["target_modules"] != ["query"]


def named(name: str) -> Callable[[dict[str, Any]], bool]:
    return lambda config: config["base_model_name_or_path"] == name


def with_basis(folder: Path) -> Path:
    """The folder of a task's basis."""
    return (folder / said(folder / CONFIG)["basis"]).resolve()


@pytest.fixture(scope="module", autouse=True)
def little_garbage() -> Iterator[None]:
    """Keep what other modules left out of every collection, which then takes little time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_basis_in_memory(little_garbage) -> None:
    """Forget earlier tests' models: a basis that one of them held would be found whatever a task says of its place."""
    gc.collect()


@pytest.fixture(scope="module")
def made() -> dict[str | None, nn.Module]:
    return {name: make() for name, make in MAKERS.items()}


@pytest.fixture
def base(made) -> Callable[[Path | None], nn.Module]:
    """A base model of its own for a task's folder, by default BERT."""

    def copied(folder: Path | None = None) -> nn.Module:
        return copy.deepcopy(made[None if folder is None else said(folder / CONFIG)["base_model_name_or_path"]])

    return copied


def agree(given: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)


def logits_of(folder: Path) -> torch.Tensor:
    return TENSORS[folder.parent.parent]["/".join(folder.parts[-2:])]


def check(model: nn.Module, folder: Path) -> None:
    agree(outputs(model), logits_of(folder))


def forget(model: nn.Module) -> nn.Module:
    """Set all of an adapter's coefficients to zero."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "subspace_coef" in name:
                value.zero_()
    return model


def same_json(new: Any, old: Any) -> None:
    """Hold a written configuration against the stored one; a newer PEFT may have keys of its own."""
    known = {key for key in PeftConfig.__dataclass_fields__ if key not in old} | WRITTEN_BY
    assert {key: value for key, value in new.items() if key not in known} == {
        key: value for key, value in old.items() if key not in WRITTEN_BY
    }


def same_bytes(new: Path, old: Path) -> None:
    """Hold a safetensors file against the stored one: names, dtypes, shapes, bytes, metadata."""
    one, two = load_file(new), load_file(old)
    assert list(one) == list(two)
    for key, value in one.items():
        assert value.dtype == two[key].dtype, key
        assert torch.equal(value, two[key]), key
    with safe_open(new, "pt") as given, safe_open(old, "pt") as wanted:
        assert (given.metadata() or {}).keys() == (wanted.metadata() or {}).keys()


def same_task(new: Path, old: Path, **changed: Any) -> None:
    same_json(said(new / CONFIG), {**said(old / CONFIG), **changed})
    same_bytes(new / WEIGHTS, old / WEIGHTS)


# -- tasks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", folders("tasks"))
def test_a_task_loads_and_is_written_again_as_it_was(base, folder, tmp_path):
    model = PeftModel.from_pretrained(base(folder), folder)
    check(model, folder)
    assert set(read_task(model).cores) == _modules(folder)
    model.save_pretrained(tmp_path)
    # what PEFT's own writer adds to the tasks that others wrote
    same_task(tmp_path, folder, **_filled_in(folder, tmp_path))


def _modules(folder: Path) -> set[str]:
    prefix = f"tasks/{folder.name}/"
    return {key.removeprefix(prefix) for key in TENSORS[folder.parent.parent] if key.startswith(prefix)}


def _filled_in(folder: Path, again: Path) -> dict[str, Any]:
    old, new = said(folder / CONFIG), said(again / CONFIG)
    keys = {key for key in ("auto_mapping", "base_model_name_or_path", "base_probe", "card") if old[key] is None}
    if (old["card"] or {}).get("base", {}).get("injected"):
        keys.add("card")
    # PEFT appends the names of usual heads once more whenever a classifier is loaded
    if old["modules_to_save"] and set(new["modules_to_save"]) == set(old["modules_to_save"]):
        keys.add("modules_to_save")
    return {key: new[key] for key in keys}


@pytest.mark.parametrize("folder", folders("tasks", stored))
def test_a_task_that_was_moved_loads_with_its_basis(base, folder, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "moved")
    check(PeftModel.from_pretrained(base(folder), moved, basis=str(with_basis(folder))), folder)
    basis = SubspaceBasis.from_pretrained(with_basis(folder))
    for module, core in read_task(moved, basis=basis).cores.items():
        torch.testing.assert_close(core, TENSORS[folder.parent.parent][f"tasks/{folder.name}/{module}"])


@pytest.mark.parametrize("folder", folders("tasks", lambda config: config["bias"] == "none"))
def test_a_task_loads_beside_another(base, folder):
    first = folder.parent / ("core" if named("org/tiny-bert")(said(folder / CONFIG)) else folder.name)
    model = PeftModel.from_pretrained(base(folder), first)
    model.load_adapter(folder, "other")
    model.set_adapter("other")
    check(model, folder)
    if not trains_more(said(folder / CONFIG)):
        model.set_adapter("default")
        check(model, first)


@needs_transformers_adapters
@pytest.mark.parametrize(
    "folder", folders("tasks", lambda config: plain(config) and not named("org/tiny-small")(config))
)
def test_transformers_own_loader_reads_a_task(base, folder):
    # this loader does not say beside what a relative basis is to be looked for; an open one is found
    held = SubspaceBasis.from_pretrained(with_basis(folder)) if stored(said(folder / CONFIG)) else None
    model = base(folder)
    model.load_adapter(str(folder))
    del held
    check(model, folder)


@pytest.mark.parametrize("folder", folders("tasks", plain))
def test_a_task_is_injected_into_a_model(base, folder, tmp_path):
    model = base(folder)
    load_adapter(model, folder)
    check(model, folder)
    assert any(isinstance(module, SubspaceLayer) for module in model.modules())
    if folder.name == "injected":
        save_adapter(model, tmp_path, "default")
        # transformers' own call fills in the model's name
        same_task(tmp_path, folder, base_model_name_or_path=said(tmp_path / CONFIG)["base_model_name_or_path"])


@pytest.mark.parametrize("folder", folders("tasks", lambda config: config["task_type"] == "SEQ_CLS"))
def test_auto_classes_load_a_task_and_its_base_model(base, folder, tmp_path):
    base().save_pretrained(tmp_path / "base")
    moved = shutil.copytree(folder, tmp_path / "moved")
    changes = {"base_model_name_or_path": str(tmp_path / "base"), "check_base_model": False}
    (moved / CONFIG).write_text(json.dumps({**said(folder / CONFIG), **changes, "basis": str(with_basis(folder))}))
    check(AutoPeftModelForSequenceClassification.from_pretrained(moved), folder)


@pytest.mark.parametrize("folder", folders("tasks"))
def test_a_task_is_read_without_a_model(folder, capsys):
    root = folder.parent.parent
    expected, old = EXPECTED[root]["tasks"][folder.name], said(folder / CONFIG)
    task = read_task(folder)
    assert sorted(task.extras) == expected["extras"]
    assert set(task.cores) == set(task.modules) == _modules(folder)
    for module, core in task.cores.items():
        torch.testing.assert_close(core, TENSORS[root][f"tasks/{folder.name}/{module}"])
    for config in (task.config, SubspaceConfig.from_pretrained(str(folder)), PeftConfig.from_pretrained(folder)):
        assert isinstance(config, SubspaceConfig)
        same_json(json.loads(json.dumps(config.to_dict())), old)
    assert main(["inspect", str(folder), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["location"] == str(folder)
    assert shown == {**_close(expected["inspect"]), "location": str(folder), "basis": old["basis"]}


def _without(facts: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key not in keys}


@pytest.mark.parametrize(
    "folder",
    folders("tasks", lambda config: config["bias"] == "none" and not config["trainable_token_indices"]),
)
def test_a_task_is_exported_as_a_lora(base, folder, tmp_path):
    export_lora(folder, tmp_path)
    model = PeftModel.from_pretrained(base(folder), tmp_path)
    assert model.peft_config["default"].peft_type == "LORA"
    check(model, folder)


@pytest.mark.parametrize("folder", folders("tasks", whole))
def test_a_bank_holds_a_task(base, folder):
    model = PeftModel.from_pretrained(base(folder), folder)
    bank = TaskBank(model)
    bank.add("a", folder)
    forget(model)
    with bank.tasks(["a", "__base__", "a"]):
        agree(outputs(model)[::2], logits_of(folder)[::2])


@pytest.mark.parametrize("folder", folders("tasks", lambda config: config["bias"] == "none"))
def test_a_task_is_swapped_in(base, folder):
    model = forget(PeftModel.from_pretrained(base(folder), folder))
    assert not torch.allclose(outputs(model), logits_of(folder), atol=1e-3)
    hotswap(model, folder)
    check(model, folder)


@pytest.mark.parametrize("root", VERSIONS, ids=lambda root: root.name)
def test_tasks_are_written_again_by_their_own_writers(base, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tasks = root / "tasks"
    bank = TaskBank(PeftModel.from_pretrained(base(), tasks / "core"))
    bank.add("one", tasks / "core-mean-fixed")
    bank.save_task("one", "banked")
    # a division by the scale is in it
    same_json(said(Path("banked", CONFIG)), said(tasks / "banked" / CONFIG))
    close_tensors(Path("banked", WEIGHTS), tasks / "banked" / WEIGHTS)
    extract_task(root / "bundles" / "plain", "directions", "extracted")
    _same_but_places(Path("extracted"), tasks / "extracted")
    same_bytes(Path("extracted", WEIGHTS), tasks / "extracted" / WEIGHTS)
    project_lora(str(root / "loras" / "bert-5"), root / "bases" / "float32").save_pretrained("projected")
    migrate_task(tasks / "factor", root / "bases" / "updated").save_pretrained("migrated")
    for name in ("projected", "migrated"):
        _same_but_places(Path(name), tasks / name)
        close_tensors(Path(name, WEIGHTS), tasks / name / WEIGHTS)


def _same_but_places(new: Path, old: Path) -> None:
    """Hold a task's configuration, which names this machine's places, against the stored one."""
    config, wanted = said(new / CONFIG), said(old / CONFIG)
    assert Path(config.pop("basis")).name == Path(wanted.pop("basis")).name
    for each in (config, wanted):
        if each["bundle"] is not None:
            each["bundle"]["location"] = Path(each["bundle"]["location"]).name
    if config["card"] is not None and "of" not in (wanted["card"] or {}):
        # version 0.1.0 put the hash of the coefficients into some cards only
        config["card"].pop("of", None)
    same_json(config, wanted)


def close_tensors(new: Path, old: Path) -> None:
    """Hold a file that products of matrices are in against the stored one."""
    one, two = load_file(new), load_file(old)
    assert list(one) == list(two)
    for key, value in one.items():
        assert value.dtype == two[key].dtype, key
        torch.testing.assert_close(value, two[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("folder", folders("exports"))
def test_an_exported_lora_loads_and_is_written_again(base, folder, tmp_path, capsys):
    task = folder.parent.parent / "tasks" / folder.name
    check(PeftModel.from_pretrained(base(task), folder), task)
    old = said(folder / CONFIG)
    assert main(["export-lora", str(task), "--out", str(tmp_path), "--pad-to", str(old["r"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rank"] == old["r"]
    new = said(tmp_path / CONFIG)
    # LoRA's own keys are PEFT's
    assert {key: new[key] for key in old if key not in WRITTEN_BY} == _without(old, *WRITTEN_BY)
    close_tensors(tmp_path / WEIGHTS, folder / WEIGHTS)


# -- cards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", VERSIONS, ids=lambda root: root.name)
def test_an_earlier_card_is_replaced_and_what_is_around_it_kept(root, tmp_path):
    task, basis = (Path(shutil.copytree(root / name, tmp_path / name)) for name in ("tasks/carded", "bases/float32"))
    before = {folder: (folder / "README.md").read_text(encoding="utf-8") for folder in (task, basis)}
    for folder, text in before.items():
        (folder / "README.md").write_text(f"{text}\nMine, below.\n", encoding="utf-8")
    write_card(task)
    SubspaceBasis.from_pretrained(basis).save_pretrained(basis)
    for folder, text in before.items():
        after = (folder / "README.md").read_text(encoding="utf-8")
        assert after.endswith("Mine, below.\n")
        assert after.count("subspace_peft: begin") == text.count("subspace_peft: begin") == 1
        # front matter that the package wrote, and no key twice
        assert after.split("---\n")[1] == text.split("---\n")[1]
        titles = [[line for line in each.splitlines() if line.startswith("#")] for each in (after, text)]
        assert titles[0] == titles[1]
    same_task(task, root / "tasks" / "carded")


# -- bases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", folders("bases"))
def test_a_basis_loads_and_is_written_again_as_it_was(folder, tmp_path, capsys):
    root = folder.parent.parent
    expected, tensors = EXPECTED[root]["bases"][folder.name], TENSORS[root]
    basis = SubspaceBasis.from_pretrained(folder, fingerprint=expected["fingerprint"])
    assert basis.fingerprint == expected["fingerprint"]
    assert basis.digests == expected["digests"]
    assert basis.shapes() == expected["shapes"]
    assert (basis.describe_k(), basis.precision, basis.base_model) == tuple(
        expected[key] for key in ("k", "precision", "base_model")
    )
    wanted = said(folder / "basis_config.json")
    measured = {**wanted, **wanted.get("measured", {})}
    assert wanted["fingerprint"] == expected["fingerprint"]
    assert basis.info == _without(wanted, "modules", "fingerprint", "format_version")
    saved = load_file(folder / "basis.safetensors")
    for name, module in basis.items():
        assert isinstance(module, ModuleBasis)
        for key, value in module.tensors().items():
            meant = tensors.get(f"bases/{folder.name}/{name}.{key}", saved[f"{name}.{key}"])
            torch.testing.assert_close(value, meant, atol=1e-6, rtol=1e-6)
        core = torch.ones(module.k_out, module.k_in, dtype=torch.float64)
        torch.testing.assert_close(module.project(module.reconstruct(core)), core, atol=1e-5, rtol=1e-5)
    basis.save_pretrained(tmp_path)
    assert (tmp_path / "basis.safetensors").read_bytes() == (folder / "basis.safetensors").read_bytes()
    same_json(said(tmp_path / "basis_config.json"), said(folder / "basis_config.json"))
    assert main(["validate", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    assert main(["inspect", str(folder), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown.pop("location") == str(folder)
    assert shown.keys() == set(expected["inspect"])
    for key, value in expected["inspect"].items():
        assert shown[key] == (measured[key] if key in COPIED else _close(value))


@pytest.mark.parametrize("root", VERSIONS, ids=lambda root: root.name)
def test_a_basis_is_built_again_and_updated(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(root)  # from where its sources' places are relative
    assert (
        main(
            [
                "build",
                "--from-config",
                str(root / "bases" / "float32"),
                "--out",
                str(tmp_path / "again"),
                "--json",
                "--quiet",
            ]
        )
        == 0
    )
    old, again = (
        SubspaceBasis.from_pretrained(root / "bases" / "float32"),
        SubspaceBasis.from_pretrained(tmp_path / "again"),
    )
    assert again.info["measured"]["energy_kept"] == pytest.approx(old.info["measured"]["energy_kept"], abs=1e-6)
    for name, module in old.items():
        for key, value in module.tensors().items():
            torch.testing.assert_close(again[name].tensors()[key], value, atol=1e-4, rtol=1e-3)
    new, wanted = update_basis(old, ["loras/bert-5"], add=2, progress=False), root / "bases" / "updated"
    expected = SubspaceBasis.from_pretrained(wanted)
    assert [entry["fingerprint"] for entry in new.info["lineage"]] == [old.fingerprint]
    assert new.info["update"] == _close(expected.info["update"])
    assert new.info["columns"] == expected.info["columns"]
    for precision in ("int8", "float16", "bfloat16"):
        # rounding is the same everywhere
        assert old.to_precision(precision).fingerprint == EXPECTED[root]["bases"][precision]["fingerprint"]


def _close(value: Any) -> Any:
    """Numbers of nested dictionaries to a tolerance."""
    if isinstance(value, dict):
        return {key: _close(each) for key, each in value.items()}
    return pytest.approx(value, abs=1e-6) if isinstance(value, float) else value


# -- bundles and banks ----------------------------------------------------------------------------------------------


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
        index["config"]["basis"] = Path(index["config"]["basis"]).name
    return index


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
    assert shown == expected
    model = None
    for name in bundle:
        logits = TENSORS[root][f"bundles/{folder.name}/{name}"]
        agree(outputs(load_task(base(), folder / "bundle.safetensors", name)), logits)
        task = bundle.task(name)
        assert task.config.basis_fingerprint == expected["fingerprint"]
        assert set(task.cores) == set(bundle.sizes(name))
        if not bundle[name].residual_rank:
            # several tasks in one model
            model = load_task(base() if model is None else model, bundle, name, f"as-{name}")
            model.set_adapter(f"as-{name}")
            agree(outputs(model), logits)
        export_lora(task, tmp_path / "lora" / name)
        agree(outputs(PeftModel.from_pretrained(base(), tmp_path / "lora" / name)), logits)
    for out in extract_tasks(folder, tmp_path / "out", progress=False):
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
        assert loaded == list(open_bundle(root / "bundles" / folder))
        for name in loaded:
            for module, core in open_bundle(root / "bundles" / folder).read(name).cores.items():
                assert torch.equal(other[name][module], core.float())


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
            assert not any(start in data for start in (b"/tmp/", b"/work/", b"/home/", b"/root/", b"/Users/")), file
            assert file.suffix not in (".json", ".md") or b'"/' not in data, file
