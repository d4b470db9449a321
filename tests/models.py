"""Small models and adapters that the tests share, made in code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers.integrations.peft
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from subspace_peft.tuner import SubspaceLayer

# transformers 5.24 came out before the PEFT that it asks for; it refuses stock LoRA just the same
needs_transformers_adapters = pytest.mark.skipif(
    Version(peft.__version__) < Version(transformers.integrations.peft.MIN_PEFT_VERSION),
    reason=f"add_adapter of transformers {transformers.__version__} refuses PEFT {peft.__version__}",
)


def bert(seed: int = 0, layers: int = 2) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=48, vocab_size=100
    )
    return BertForSequenceClassification(config).eval()


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100, n_positions=32)).eval()


def logits(model: nn.Module, x: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(inputs() if x is None else x).logits


def layers(model: nn.Module) -> list[SubspaceLayer]:
    return [module for module in model.modules() if isinstance(module, SubspaceLayer)]


TARGETS = {bert: ["query", "value"], gpt2: ["c_attn"]}


def train_lora(make: Callable[..., nn.Module], folder: Path, seed: int, **config: object) -> Path:
    """A stock LoRA with random weights on both sides, saved by PEFT."""
    model = make()
    torch.manual_seed(seed)
    given = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[make], "fan_in_fan_out": make is gpt2, **config}
    model = get_peft_model(model, LoraConfig(**given))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def inputs() -> torch.Tensor:
    return torch.randint(0, 100, (3, 7), generator=torch.Generator().manual_seed(1))


def randomise(model: nn.Module, seed: int = 3, std: float = 0.3) -> nn.Module:
    """Random coefficients, as if trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "subspace_coef" in name:
            parameter.data.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model


def check_merging(model: nn.Module) -> torch.Tensor:
    """A model merged computes the same, and unmerged has its weights again; returns its logits."""
    before = [layer.get_base_layer().weight.clone() for layer in layers(model)]
    expected = logits(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    assert all(
        (layer.get_base_layer().weight - old).abs().max() > 1e-4
        for layer, old in zip(layers(model), before, strict=True)
    )
    model.unmerge_adapter()
    for layer, old in zip(layers(model), before, strict=True):
        torch.testing.assert_close(layer.get_base_layer().weight, old, atol=1e-6, rtol=1e-5)
    return expected


def check_saved(model: nn.Module, make: Callable[..., nn.Module], folder: Path) -> None:
    """A task saved in ``folder / "a"`` and loaded computes the same, and saved again is the same file."""
    model.save_pretrained(folder / "a")
    loaded = PeftModel.from_pretrained(make(), folder / "a").eval()
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(folder / "b")
    name = "adapter_model.safetensors"
    assert (folder / "a" / name).read_bytes() == (folder / "b" / name).read_bytes()


def basis_storage(model: nn.Module) -> int:
    """Bytes of distinct basis storage in `model`, whatever the number of adapters that use it."""
    seen: dict[int, int] = {}
    for layer in model.modules():
        if isinstance(layer, SubspaceLayer):
            for container in (layer.subspace_U, layer.subspace_V, layer.subspace_M, layer.subspace_G):
                for name in container:
                    storage = container[name].untyped_storage()
                    seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())
