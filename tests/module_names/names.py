"""Names of wrappers in an adapter's keys, and an adapter whose keys have them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from subspace_peft import build_basis

from ..models import bert, inputs

P = "base_model.model."


def per_layer(wrapper: str) -> Callable[[str], str]:
    return lambda key: re.sub(r"layer\.(\d+)\.", rf"layer.\1.{wrapper}.", key)


KINDS: dict[str, Callable[[str], str]] = {
    "compiled": lambda key: "_orig_mod." + key,
    "compiled inside": lambda key: key.replace(P, f"{P}_orig_mod."),
    "compiled layers": per_layer("_orig_mod"),
    "compiled linears": lambda key: key.replace(".lora_", "._orig_mod.lora_"),
    "tuner compiled": lambda key: key.replace(P, "base_model._orig_mod.model."),
    "ddp": lambda key: "module." + key,
    "ddp inside": lambda key: key.replace(P, f"{P}module."),
    "ddp, no peft": lambda key: "module." + key.removeprefix(P),
    "fsdp": lambda key: "_fsdp_wrapped_module." + per_layer("_fsdp_wrapped_module")(key),
    "checkpointing": per_layer("_checkpoint_wrapped_module"),
    "fabric": lambda key: "_forward_module." + key,
    "peft twice": lambda key: P + key,
    "peft three times, wrapped": lambda key: f"{P}module.{P}_orig_mod." + key,
    "all at once": lambda key: "module._orig_mod." + per_layer("_checkpoint_wrapped_module._orig_mod")(P + key),
    "ddp of compiled, no peft": lambda key: "module._orig_mod." + key.removeprefix(P),
    "lightning": lambda key: f"_forward_module.student.{key}",
    "no prefix": lambda key: key.removeprefix(P),
}


def lora(folder: Path, seed: int, rename: Callable[[str], str] = lambda key: key, **config: Any) -> Path:
    """A stock LoRA whose scale differs from module to module, its classifier trained; keys renamed."""
    given = {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["query", "value"],
        "alpha_pattern": {rename(f"{P}bert.encoder.layer.1.attention.self.query").removeprefix(P): 12},
        "modules_to_save": ["classifier"],
        "task_type": "SEQ_CLS",
    }
    model = get_peft_model(bert(), LoraConfig(**{**given, **config}))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    save_file({rename(key): value for key, value in load_file(file).items()}, file)
    # the pattern that this model was trained with, whatever it is called in the file
    return folder


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(inputs()).logits


class Fleet:
    """A clean LoRA, what it computes, and a basis that holds it whole."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.clean = lora(root / "clean", 0, alpha_pattern={"layer.1.attention.self.query": 12})
        self.want = logits(PeftModel.from_pretrained(bert(), self.clean))
        others = [lora(root / f"other{i}", 1 + i, alpha_pattern={}) for i in range(2)]
        self.basis = build_basis([self.clean, *others], k=12, progress=False).save_pretrained(root / "basis")
        self.odd = {kind: lora(root / kind, 0, rename) for kind, rename in KINDS.items()}
