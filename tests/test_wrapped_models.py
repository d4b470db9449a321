"""Tasks of models whose layers are wrapped by activation checkpointing, or whose head differs from the task's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import BertModel, GPT2Model

from subspace_peft import (
    SubspaceConfig,
    build_basis,
    export_lora,
    hotswap,
    load_adapter,
    project_lora,
    save_adapter,
)

from .models import bert, gpt2, inputs, randomise, train_lora


def checkpointed() -> nn.Module:
    """A model whose state dict has other names than its modules, as torch's wrapper hides its own."""
    model = bert()
    layers = model.bert.encoder.layer
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(inputs()).logits


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrapped")
    loras = [train_lora(bert, folder / f"lora{i}", seed=i) for i in (1, 2)]
    build_basis(loras, k=8, progress=False).save_pretrained(folder / "basis")
    for i, lora in enumerate(loras):
        project_lora(lora, folder / "basis").save_pretrained(folder / f"task{i}")
    return folder


@pytest.mark.parametrize("save_basis", [False, True])
@pytest.mark.parametrize("heads", [None, ["classifier"]])
def test_what_is_trained_under_checkpointing_is_saved(place, tmp_path, save_basis, heads):
    config = SubspaceConfig(basis=str(place / "basis"), save_basis=save_basis, modules_to_save=heads)
    model = get_peft_model(checkpointed(), config)
    want = logits(randomise(model))
    model.save_pretrained(tmp_path / "task")
    assert sum("subspace_coef" in key for key in load_file(tmp_path / "task" / "adapter_model.safetensors")) == 4
    for base in (bert(), checkpointed()):
        torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "task")), want)


def test_patterns_mean_the_same_modules_with_and_without_wrappers(place, tmp_path):
    query, value = "layer.0.attention.self.query", "_checkpoint_wrapped_module.attention.self.value"
    patterns = {"rank_pattern": {query: 3, value: 5}, "extra_rank_pattern": {query: 2, value: 0}}
    model = get_peft_model(checkpointed(), SubspaceConfig(basis=str(place / "basis"), extra_rank=1, **patterns))
    want = logits(randomise(model))
    given = [(layer.r["default"][0], layer.extra_rank["default"]) for layer in model.modules() if hasattr(layer, "r")]
    assert given == [(3, 2), (5, 0), (8, 1), (5, 0)]
    model.save_pretrained(tmp_path / "task")
    for base in (bert(), checkpointed()):
        torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "task")), want)
    export_lora(tmp_path / "task", tmp_path / "lora")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(bert(), tmp_path / "lora")), want)


def compiled() -> nn.Module:
    return torch.compile(bert(), backend="eager")


@pytest.mark.parametrize("make", [bert, compiled])
def test_a_head_that_is_trained_whole_goes_in_and_out_of_wrappers(place, tmp_path, make):
    config = SubspaceConfig(basis=str(place / "basis"), task_type="SEQ_CLS")
    model = randomise(get_peft_model(make(), config))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.normal_()
    want = logits(model)
    model.save_pretrained(tmp_path / "task")
    assert not any("_orig_mod" in key for key in load_file(tmp_path / "task" / "adapter_model.safetensors"))
    for base in (bert(), compiled()):
        loaded = PeftModel.from_pretrained(base, tmp_path / "task")
        torch.testing.assert_close(logits(loaded), want)
        loaded.load_adapter(tmp_path / "task", "again")
        loaded.set_adapter("again")
        torch.testing.assert_close(logits(loaded), want)
    # as an earlier version saved it
    file = tmp_path / "task" / "adapter_model.safetensors"
    save_file(
        {key.replace(".classifier", "._orig_mod.classifier"): value for key, value in load_file(file).items()}, file
    )
    torch.testing.assert_close(logits(PeftModel.from_pretrained(bert(), tmp_path / "task")), want)


def loaded(place: Path) -> nn.Module:
    return PeftModel.from_pretrained(checkpointed(), place / "task0")


def second(place: Path) -> nn.Module:
    model = PeftModel.from_pretrained(checkpointed(), place / "task1")
    model.load_adapter(place / "task0", "other")
    model.set_adapter("other")
    return model


def injected(place: Path) -> nn.Module:
    model = checkpointed()
    load_adapter(model, place / "task0", "s")
    return model


def saved_again(place: Path) -> nn.Module:
    model = injected(place)
    model.peft_config["s"].base_model_name_or_path = "org/base"
    save_adapter(model, place / "again", "s", overwrite=True)
    return PeftModel.from_pretrained(bert(), place / "again")


def exported(place: Path) -> nn.Module:
    export_lora(loaded(place), place / "exported", overwrite=True)
    return PeftModel.from_pretrained(bert(), place / "exported")


@pytest.mark.parametrize("way", [loaded, second, injected, saved_again, exported])
def test_a_task_is_loaded_under_checkpointing(place, way):
    want = logits(PeftModel.from_pretrained(bert(), place / "task0"))
    assert (logits(bert()) - want).abs().max() > 1e-4
    torch.testing.assert_close(logits(way(place)), want, atol=1e-6, rtol=1e-5)


def backbone_of_bert() -> nn.Module:
    return bert().bert


def backbone_of_gpt2() -> nn.Module:
    return gpt2().transformer


HEADS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], type]] = {
    "bert": (bert, backbone_of_bert, BertModel),
    "gpt2": (gpt2, backbone_of_gpt2, GPT2Model),
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("to_backbone", [True, False])
def test_a_task_is_swapped_in_under_another_head(tmp_path, kind, to_backbone):
    whole, backbone, inner = HEADS[kind]
    loras = [train_lora(whole, tmp_path / f"lora{i}", seed=i) for i in (1, 2)]
    basis = build_basis(loras, k=8, progress=False).save_pretrained(tmp_path / "basis")

    def hidden(model: nn.Module) -> torch.Tensor:
        found = next(module for module in model.modules() if isinstance(module, inner)).eval()
        with torch.no_grad():
            return found(inputs()).last_hidden_state

    for i, lora in enumerate(loras):
        project_lora(lora, basis).save_pretrained(tmp_path / f"task{i}")
    if not to_backbone:
        # tasks that were trained in the backbone
        for i in range(2):
            PeftModel.from_pretrained(backbone(), tmp_path / f"task{i}").save_pretrained(tmp_path / f"task{i}")
    make = backbone if to_backbone else whole
    want = hidden(PeftModel.from_pretrained(make(), tmp_path / "task0"))
    model = get_peft_model(make(), SubspaceConfig(basis=str(basis)))
    for task in ("task1", "task0"):
        hotswap(model, tmp_path / task)
    torch.testing.assert_close(hidden(model), want)
    # what is saved now has the model's own names
    model.save_pretrained(tmp_path / "saved")
    names = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["target_modules"]
    assert set(names) <= {name for name, _ in make().named_modules()}
    torch.testing.assert_close(hidden(PeftModel.from_pretrained(make(), tmp_path / "saved")), want)
