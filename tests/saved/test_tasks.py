"""Files of earlier versions load through every public door with their numbers, and are written as they were: tasks."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftConfig, PeftModel

from subspace_peft import (
    SubspaceBasis,
    SubspaceConfig,
    TaskBank,
    export_lora,
    extract_task,
    hotswap,
    load_adapter,
    migrate_task,
    project_lora,
    save_adapter,
    write_card,
)
from subspace_peft.cli import main
from subspace_peft.convert import read_task
from subspace_peft.tuner import SubspaceLayer
from subspace_peft.tuner.adapter_layer import AdapterLayer
from subspace_peft.tuner.load_tracker import LoadTracker

from ..models import needs_transformers_adapters
from .checks import (
    CONFIG,
    EXPECTED,
    TENSORS,
    VERSIONS,
    WEIGHTS,
    WRITTEN_BY,
    agree,
    check,
    close_numbers,
    close_tensors,
    folders,
    forget,
    logits_of,
    named,
    plain,
    said,
    same_but_places,
    same_bytes,
    same_json,
    same_task,
    stored,
    trains_more,
    whole,
    with_basis,
    without,
)
from .models import outputs


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
    # what later versions say beside: no task of 0.1.0 has own directions
    more = {name: shown.pop(name) for name in ("parameters", "own_parameters", "own_directions")}
    assert more["own_parameters"] == 0 and not any(more["own_directions"].values())
    assert shown == {**close_numbers(expected["inspect"]), "location": str(folder), "basis": old["basis"]}


@pytest.mark.parametrize(
    "folder",
    folders("tasks", lambda config: config["bias"] == "none" and not config["trainable_token_indices"]),
)
def test_a_task_is_exported_as_a_lora(base, folder, tmp_path):
    export_lora(folder, tmp_path)
    model = PeftModel.from_pretrained(base(folder), tmp_path)
    assert model.peft_config["default"].peft_type == "LORA"
    check(model, folder)


def _as_before_moves(layer: AdapterLayer) -> dict[str, Any]:
    """Return the state of a layer with the attributes that it had in the version that saved these files."""
    state = {key: value for key, value in vars(layer).items() if key != "bases"}
    return {**state, "arrivals": state.pop("load_trackers")}


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("folder", folders("tasks", lambda config: named("org/tiny-bert")(config) and plain(config)))
def test_a_model_that_was_pickled_whole_works_as_before(base, folder, checked, monkeypatch):
    model = PeftModel.from_pretrained(base(folder), folder)
    if not checked:
        # as loaders that bypass the configuration's class leave a layer until its first forward pass
        for name, layer in model.named_modules():
            if isinstance(layer, AdapterLayer):
                tracker = LoadTracker()
                tracker.loaded = {(name, key) for key, _ in layer.subspace_coef["default"].named_parameters()}
                layer.load_trackers["default"] = (tracker, name, set())
    with monkeypatch.context() as patch:
        patch.setattr(AdapterLayer, "__getstate__", _as_before_moves)
        patch.setattr(LoadTracker, "__getstate__", lambda tracker: {"came": tracker.loaded}, raising=False)
        data = pickle.dumps(model)
    again = pickle.loads(data)
    check(again, folder)
    again.load_adapter(folder, "other")
    again.set_adapter("other")
    check(again, folder)
    check(again.merge_and_unload(), folder)


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
    same_but_places(Path("banked"), tasks / "banked")
    close_tensors(Path("banked", WEIGHTS), tasks / "banked" / WEIGHTS)
    extract_task(root / "bundles" / "plain", "directions", "extracted")
    same_but_places(Path("extracted"), tasks / "extracted")
    same_bytes(Path("extracted", WEIGHTS), tasks / "extracted" / WEIGHTS)
    project_lora(str(root / "loras" / "bert-5"), root / "bases" / "float32").save_pretrained("projected")
    migrate_task(tasks / "factor", root / "bases" / "updated").save_pretrained("migrated")
    for name in ("projected", "migrated"):
        same_but_places(Path(name), tasks / name)
        close_tensors(Path(name, WEIGHTS), tasks / name / WEIGHTS)


@pytest.mark.parametrize("folder", folders("exports"))
def test_an_exported_lora_loads_and_is_written_again(base, folder, tmp_path, capsys):
    task = folder.parent.parent / "tasks" / folder.name
    check(PeftModel.from_pretrained(base(task), folder), task)
    old = said(folder / CONFIG)
    assert main(["export-lora", str(task), "--out", str(tmp_path), "--pad-to", str(old["r"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rank"] == old["r"]
    new = said(tmp_path / CONFIG)
    # LoRA's own keys are PEFT's
    assert {key: new[key] for key in old if key not in WRITTEN_BY} == without(old, *WRITTEN_BY)
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
