"""A saved task's configuration makes a new task as the first one's own did, field by field."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

from subspace_peft import SubspaceConfig, TaskBank, export_lora, hotswap
from subspace_peft.errors import BadFileError
from subspace_peft.tasks.read import read_task

from .models import bert, layers, logits, randomise

KINDS = ("core", "factor", "diagonal", "directions")
# what a user may set → values to try, with what they need beside them
SET: dict[str, list[dict[str, Any]]] = {
    "coefficients": [{"coefficients": kind} for kind in KINDS]
    + [{"coefficients": "none", "mean_gain": "trainable", "start": start} for start in ("zero", "mean")],
    "k": [{"k": 3}],
    "rank_pattern": [{"rank_pattern": {"query": 2, "0.attention.self.value": [3, 4]}}],
    "extra_rank": [{"extra_rank": 1}],
    "extra_rank_pattern": [{"extra_rank_pattern": {"query": 2}}],
    "r": [{"coefficients": "factor", "r": 2}],
    "alpha": [{"alpha": 8.0}],
    "dropout": [{"dropout": 0.1}],
    "mean_gain": [{"mean_gain": "fixed"}, {"mean_gain": "trainable"}],
    "start": [
        {"start": start, "coefficients": kind, "mean_gain": gain}
        for start in ("mean", "lora1")
        for kind in KINDS
        for gain in ("none", "fixed", "trainable")
    ],
    "init_weights": [{"init_weights": False}, {"init_weights": False, "coefficients": "factor", "extra_rank": 1}],
    "target_modules": [{"target_modules": ["query"]}, {"target_modules": r".*\.0\..*\.value"}],
    "exclude_modules": [{"exclude_modules": ["value"]}],
    "modules_to_save": [{"modules_to_save": ["classifier"]}],
    "bias": [{"bias": "all"}, {"bias": "subspace_only"}],
    "trainable_token_indices": [{"trainable_token_indices": {"word_embeddings": [1, 2]}}],
    "layers_to_transform": [{"target_modules": ["query"], "layers_to_transform": [0]}],
    "layers_pattern": [{"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": ["layer"]}],
    "check_base_model": [{"check_base_model": False}],
    "strict": [{"strict": True}],
    "id2label": [{"id2label": {0: "no", 1: "yes"}}],
    "task_type": [{"task_type": "SEQ_CLS"}],
    "basis": [{}],
}
# the basis is in the saved task's own file, from where alone a new task gets it
CARRIED: dict[str, list[dict[str, Any]]] = {
    "save_basis": [{"save_basis": True}, {"save_basis": True, "mean_gain": "trainable", "start": "mean"}],
    "seed": [{"basis": "random", "k": 4, "seed": 5}, {"basis": "base-weights", "k": 4, "target_modules": ["query"]}],
}
FILLED = {
    *("basis_fingerprint", "basis_names", "fan_in_fan_out", "base_probe", "base_weights", "basis_modules"),
    *("weight_shapes", "bundle", "card", "subspace_version", "loaded_from", "taken_basis", "filled_targets"),
    *("base_model_name_or_path", "auto_mapping", "peft_type", "peft_version"),
}
# tests of their own: of a Hub's revisions, of pipelines, what is refused, and PEFT's `inference_mode`
ELSEWHERE = {"basis_revision", "basis_part", "target_parameters", "revision", "inference_mode"}


def test_all_fields_are_in_the_table():
    fields = {each.name for each in dataclasses.fields(SubspaceConfig)}
    assert fields == {*SET, *CARRIED, *FILLED, *ELSEWHERE}


def made(config: SubspaceConfig) -> PeftModel:
    config.inference_mode = False
    base = bert()
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no effect.*")
        return get_peft_model(base, config)


def state(model: nn.Module, adapter: str = "default") -> dict[str, Any]:
    """What training begins with: tensors, which of them are trained, scales and dropout."""
    found: dict[str, Any] = {
        name.replace(f".{adapter}", ""): value.detach().clone()
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    for layer in layers(model):
        if adapter in layer.subspace_coef:
            scale, own = layer.scaling[adapter], layer.extra_scaling[adapter]
            found[layer.key] = torch.tensor([scale, own, getattr(layer.subspace_dropout[adapter], "p", 0.0)])
            found[f"{layer.key} ΔW"] = layer.get_delta_weight(adapter).detach()
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        # the same computation at other places in memory: a least-squares start may round otherwise
        torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-6, msg=lambda text, at=name: f"{at}: {text}")


def cases(table: dict[str, list[dict[str, Any]]]) -> Any:
    each = [(field, given) for field, values in table.items() for given in values]
    return pytest.mark.parametrize(("field", "given"), each, ids=[f"{f}: {g}" for f, g in each])


@cases(SET)
def test_a_new_task_is_made_as_the_first_was(bases, field, given, tmp_path):
    first = made(SubspaceConfig(basis=bases[bert].location, **given))
    expected = state(first)
    randomise(first).save_pretrained(tmp_path / "first")
    config = PeftConfig.from_pretrained(tmp_path / "first")
    # as PEFT saves every adapter: a new one is trained once this is off
    assert config.inference_mode
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        new = made(config)
        logits(new)
    same(state(new), expected)
    # and what is saved of it is that task
    randomise(new, seed=9).save_pretrained(tmp_path / "second")
    one, other = (SubspaceConfig.from_pretrained(tmp_path / name).to_dict() for name in ("first", "second"))
    assert {key for key, value in one.items() if other[key] != value} <= {"card"}
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "second").eval()
    assert torch.equal(logits(loaded), logits(new.eval()))


@cases(CARRIED)
def test_a_new_task_gets_a_carried_basis_from_the_loaded_one(bases, field, given, tmp_path):
    first = made(SubspaceConfig(**{"basis": bases[bert].location, **given}))
    expected = state(first)
    randomise(first).save_pretrained(tmp_path)
    config = SubspaceConfig.from_pretrained(tmp_path)
    alone = made(config)
    with pytest.raises(
        BadFileError, match=r"subspace_U, subspace_V lie in the file .*PeftModel.from_pretrained.*add_a"
    ):
        logits(alone)
    config = SubspaceConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    model = PeftModel.from_pretrained(bert(), tmp_path)
    model.add_adapter("new", config)
    model.set_adapter("new")
    logits(model)
    same(state(model, "new"), expected)


# what reads an adapter, each before its first forward pass
READ: dict[str, Callable[[PeftModel, Path], object]] = {
    "save_pretrained": lambda model, folder: model.save_pretrained(folder / "new"),
    "get_peft_model_state_dict": lambda model, _: get_peft_model_state_dict(model),
    "get_delta_weight": lambda model, _: layers(model)[0].get_delta_weight("default"),
    "merge": lambda model, _: model.merge_and_unload(),
    "add_weighted_adapter": lambda model, _: model.add_weighted_adapter(["default"], [1.0], "sum"),
    "read_task": lambda model, _: read_task(model),
    "export_lora": lambda model, folder: export_lora(model, folder / "new"),
    "hotswap": lambda model, folder: hotswap(model, folder / "first"),
    "TaskBank": lambda model, _: TaskBank(model),
}


@pytest.mark.parametrize("read", READ)
def test_a_basis_that_was_never_loaded_is_refused_by_all_that_read_an_adapter(bases, read, tmp_path):
    first = randomise(made(SubspaceConfig(basis=bases[bert].location, save_basis=True)))
    first.save_pretrained(tmp_path / "first")
    alone = made(SubspaceConfig.from_pretrained(tmp_path / "first"))
    with pytest.raises(BadFileError, match=r"subspace_U, subspace_V lie in the file .*PeftModel.from_pretrained"):
        READ[read](alone, tmp_path)
    # nothing that could be taken for a task is written, and the model is as it was
    assert not list((tmp_path / "new").glob("*.safetensors"))
    assert list(alone.peft_config) == ["default"]


@pytest.mark.parametrize("carried", [True, False])
def test_a_new_task_of_a_saved_configuration_is_saved_before_any_forward_pass(bases, carried, tmp_path):
    first = randomise(made(SubspaceConfig(basis=bases[bert].location, save_basis=carried, extra_rank=1)))
    first.save_pretrained(tmp_path / "first")
    config = SubspaceConfig.from_pretrained(tmp_path / "first")
    config.inference_mode = False
    model = PeftModel.from_pretrained(bert(), tmp_path / "first")
    model.add_adapter("new", config)
    model.set_adapter("new")
    model.save_pretrained(tmp_path / "saved", selected_adapters=["new"])
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "saved" / "new").eval()
    assert torch.equal(logits(loaded), logits(model.eval()))
    assert all(layer.subspace_U["default"].any() for layer in layers(loaded))


def test_a_new_task_that_is_swapped_for_a_saved_one_is_no_new_task(bases, tmp_path):
    model = randomise(made(SubspaceConfig(basis=bases[bert].location, start="lora1")))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "start": "gone"}))
    new = made(SubspaceConfig.from_pretrained(tmp_path))
    hotswap(new, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(logits(new.eval()), logits(model.eval()))


@pytest.mark.parametrize("start", ["mean", "lora1"])
def test_loading_puts_the_files_tensors_in_place_of_a_start(bases, start, tmp_path):
    model = randomise(made(SubspaceConfig(basis=bases[bert].location, start=start, mean_gain="trainable")))
    model.save_pretrained(tmp_path)
    for given in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(bert(), tmp_path, **given)
        assert torch.equal(logits(loaded), logits(model.eval()))
        loaded.load_adapter(tmp_path, "second", **given)
        loaded.set_adapter("second")
        assert torch.equal(logits(loaded), logits(model))


def test_a_start_that_the_basis_lacks_is_said_of_a_new_task_alone(bases, tmp_path):
    model = randomise(made(SubspaceConfig(basis=bases[bert].location, start="lora1")))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "start": "gone"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(bert(), tmp_path).eval()
        assert torch.equal(logits(loaded), logits(model.eval()))
    new = made(SubspaceConfig.from_pretrained(tmp_path))
    with pytest.warns(
        UserWarning, match="starts at zero. start='gone': no such source in the basis; choose 'zero'"
    ) as said:
        assert torch.equal(logits(new.eval()), logits(bert()))
        logits(new)
    assert len([each for each in said if "starts at zero" in str(each.message)]) == 1


def test_a_mean_that_the_first_tasks_file_lacks_is_said(bases, tmp_path):
    model = randomise(made(SubspaceConfig(basis=bases[bert].location, start="mean", save_basis=True)))
    model.save_pretrained(tmp_path)
    config = SubspaceConfig.from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path)
    loaded.add_adapter("new", config)
    loaded.set_adapter("new")
    with pytest.warns(UserWarning, match=r"start='mean': the basis is in a saved task's own file.*config.on_basis"):
        logits(loaded)
    # the remedy that it names is one
    expected = state(made(SubspaceConfig(basis=bases[bert].location, start="mean")))
    same(state(made(SubspaceConfig.from_pretrained(tmp_path).on_basis(bases[bert].location))), expected)
