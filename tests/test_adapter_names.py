"""Adapters' names that torch or PEFT cannot take are refused before the model is touched, with one that works."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from subspace_peft import SubspaceConfig, build_basis, load_adapter, load_task, save_adapter
from subspace_peft.bundle import bundle_tasks
from subspace_peft.errors import SubspaceError

from .models import bert, inputs, needs_transformers_adapters, randomise

REFUSED = {
    "": "empty",
    "a.b": "no dot",
    "__base__": "base model",
    "keys": "attribute",
    "training": "attribute",
    "__class__": "attribute",
}
WITH_HEADS = {
    "classifier": "whole",
    "my_classifier": "whole",
    "spam-score": "whole",
    "weight": "tensors",
    "bias": "tensors",
}


@pytest.fixture(scope="module")
def files(fleets, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("files")
    basis = build_basis(fleets[bert][:3], k=4, progress=False).save_pretrained(root / "basis")
    for task, kind in (("plain", None), ("headed", "SEQ_CLS")):
        model = randomise(get_peft_model(bert(), SubspaceConfig(basis=str(basis), task_type=kind)))
        model.save_pretrained(root / task)
    bundle_tasks({"plain": root / "plain", "headed": root / "headed"}, root / "bundle")
    return {name: root / name for name in ("basis", "plain", "headed", "bundle")}


def config(files: dict[str, Path], task: str) -> SubspaceConfig:
    return SubspaceConfig(basis=str(files["basis"]), task_type="SEQ_CLS" if task == "headed" else None)


def beside(model: nn.Module, name: str, files: dict[str, Path], task: str) -> Any:
    made = get_peft_model(model, config(files, task), adapter_name="first")
    made.load_adapter(str(files[task]), name)
    return made


WAYS: dict[str, Callable[[nn.Module, str, dict[str, Path], str], Any]] = {
    "get_peft_model": lambda model, name, files, task: get_peft_model(model, config(files, task), adapter_name=name),
    "from_pretrained": lambda model, name, files, task: PeftModel.from_pretrained(model, str(files[task]), name),
    "load_adapter": beside,
    "load_task": lambda model, name, files, task: load_task(model, files["bundle"], task, name),
    "inject": lambda model, name, files, task: inject_adapter_in_model(config(files, "plain"), model, name),
    "ours": lambda model, name, files, task: load_adapter(model, files["plain"], name),
}


@pytest.mark.parametrize("way", WAYS)
def test_names_that_torch_cannot_take(way, files):
    for name, message in REFUSED.items():
        model = bert()
        names = list(dict(model.named_modules()))
        with pytest.raises(SubspaceError, match=message) as heard:
            WAYS[way](model, name, files, "plain")
        assert "Pass another adapter_name" in str(heard.value)
        if way != "load_adapter":
            assert list(dict(model.named_modules())) == names
        proposed = str(heard.value).rpartition("such as '")[2].partition("'")[0]
        WAYS[way](bert(), proposed, files, "plain")


@pytest.mark.parametrize("way", ["get_peft_model", "from_pretrained", "load_adapter", "load_task"])
def test_names_beside_modules_that_are_trained_whole(way, files):
    for name, message in WITH_HEADS.items():
        with pytest.raises(SubspaceError, match=message) as heard:
            WAYS[way](bert(), name, files, "headed")
        proposed = str(heard.value).rpartition("such as '")[2].partition("'")[0]
        WAYS[way](bert(), proposed, files, "headed")
    # where no module is trained whole, nothing is taken for one
    WAYS[way](bert(), "classifier", files, "plain")


def test_an_earlier_adapter_that_would_be_taken_for_a_head_is_named(files):
    model = PeftModel.from_pretrained(bert(), str(files["plain"]), "the_classifier")
    headed = SubspaceConfig(basis=str(files["basis"]), modules_to_save=["classifier"])
    with pytest.raises(SubspaceError, match="'the_classifier'"):
        model.add_adapter("second", headed)
    assert list(model.peft_config) == ["the_classifier"]


@pytest.mark.parametrize("name", ["query", "bert", "base_layer", "subspace_coef", "a/b", "U"])
def test_other_names_make_the_round_trip(name, files, tmp_path):
    model = randomise(get_peft_model(bert(), config(files, "headed"), adapter_name=name))
    for key, parameter in model.named_parameters():
        if "modules_to_save" in key:
            parameter.data.add_(1.0)
    model.save_pretrained(tmp_path)
    for as_name in (name, "other"):
        again = PeftModel.from_pretrained(bert(), str(tmp_path / name), as_name).eval()
        with torch.no_grad():
            torch.testing.assert_close(again(inputs()).logits, model.eval()(inputs()).logits)


def test_the_list_of_heads_does_not_grow(files, tmp_path):
    folder, wanted = files["headed"], ["classifier", "score"]
    for turn in range(3):
        model = PeftModel.from_pretrained(bert(), str(folder))
        assert model.peft_config["default"].modules_to_save == wanted
        folder = tmp_path / str(turn)
        model.save_pretrained(folder)
        assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == wanted
    given = SubspaceConfig(basis=str(files["basis"]), task_type="SEQ_CLS", modules_to_save=["classifier"])
    assert get_peft_model(bert(), given).peft_config["default"].modules_to_save == wanted


@pytest.mark.parametrize("made", ["inject", pytest.param("add_adapter", marks=needs_transformers_adapters)])
def test_an_injected_adapter_says_which_base_model_it_is_for(made, files, tmp_path):
    for name in ("org/base", None):
        model = bert()
        model.config._name_or_path = name or ""
        model.name_or_path = name or ""
        if made == "inject":
            inject_adapter_in_model(config(files, "plain"), model)
        else:
            model.add_adapter(config(files, "plain"))
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            save_adapter(model, tmp_path / str(name).replace("/", "-"))
        said = [str(each.message) for each in heard if "which base model" in str(each.message)]
        assert [("base_model_name_or_path" in each) for each in said] == ([] if name else [True])
        saved = json.loads((tmp_path / str(name).replace("/", "-") / "adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == name
