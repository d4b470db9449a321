"""Models, their copies in other precisions, other models, and bases that know their base model or do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from subspace_peft import SubspaceBasis, SubspaceConfig, build_basis

SIZES = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def wide(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**SIZES, vocab_size=50)).eval()


@torch.no_grad()
def changed(change: Callable[[torch.Tensor], torch.Tensor], seed: int = 0, what: str = "") -> nn.Module:
    model = wide(seed)
    torch.manual_seed(9)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and what in name:
            parameter.copy_(change(parameter))
    return model


def by_block(weight: torch.Tensor, size: int, levels: int) -> torch.Tensor:
    parts = weight.flatten().view(-1, size)
    scale = parts.abs().amax(1, keepdim=True) / levels
    return ((parts / scale).round() * scale).view_as(weight)


def noise(share: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda w: w + share * w.std() * torch.randn_like(w)


SAME: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "itself": lambda w: w,
    "float16": lambda w: w.half().float(),
    "bfloat16": lambda w: w.bfloat16().float(),
    "int8 per row": lambda w: by_block(w, 256, 127) if w.numel() % 256 == 0 else w,
    "int8 per tensor": lambda w: by_block(w, w.numel(), 127),
    "fp8": lambda w: (w * 64).to(torch.float8_e4m3fn).float() / 64,
    "4 bits": lambda w: by_block(w, 64, 7),
    "3 bits": lambda w: by_block(w, 64, 3),
}
OTHER = {
    "absolute noise of .05": lambda w: w + 0.05 * torch.randn_like(w),
    "relative noise of .05": noise(0.05),
    "relative noise of .1": noise(0.1),
    "noise of .05 on 4 bits": lambda w: noise(0.05)(by_block(w, 64, 7)),
    "zeros": torch.zeros_like,
    "another sign": torch.neg,
    "rows in another order": lambda w: w.flip(0),
}


@pytest.fixture(scope="package")
def loras(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("loras")
    return [str(lora(root / f"lora{i}", i)) for i in range(3)]


def lora(folder: Path, seed: int) -> Path:
    import peft

    model = peft.get_peft_model(wide(), peft.LoraConfig(r=2, target_modules=["query", "value"]))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="package")
def recorded(loras, tmp_path_factory) -> Path:
    """A stored basis that was built with its base model at hand."""
    basis = build_basis(loras, k=4, base_model=wide(), progress=False)
    return basis.save_pretrained(tmp_path_factory.mktemp("recorded"))


@pytest.fixture
def plain(loras, tmp_path) -> Path:
    """A stored basis that does not know its base model's weights."""
    return build_basis(loras, k=4, progress=False).save_pretrained(tmp_path / "plain")


def adapt(model: nn.Module, basis: object, **config: object) -> PeftModel:
    place = basis if isinstance(basis, SubspaceBasis) else str(basis)
    return get_peft_model(model, SubspaceConfig(**{"basis": place, "task_type": "SEQ_CLS", **config}))
