"""Fleets of LoRAs without a model, whose modules are of very different strengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

MODULES = ("a.q", "b.up", "c.v")
SIZES = {"a.q": (24, 20), "b.up": (40, 20), "c.v": (20, 32)}


def states(n: int = 6, *, partial: bool = False, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """State dicts whose modules are of very different strengths, in a common subspace and beside it."""
    draw = torch.Generator().manual_seed(seed)
    common = {m: [torch.randn(d, 5, generator=draw) for d in size] for m, size in SIZES.items()}
    made = []
    for i in range(n):
        state = {}
        for j, (module, sides) in enumerate(common.items()):
            if partial and (i + j) % 3 == 0:
                continue
            left, right = (
                side @ torch.randn(5, 3, generator=draw) + (0.4 + 0.5 * j) * torch.randn(len(side), 3, generator=draw)
                for side in sides
            )
            strength = 10.0 ** (j - 1) * (1 + i)
            state |= {f"{module}.lora_B.weight": strength * left, f"{module}.lora_A.weight": right.T.contiguous()}
        made.append(state)
    return made


def others(i: int) -> dict[str, torch.Tensor]:
    """A convolution's and an embedding's factors."""
    draw = torch.Generator().manual_seed(100 + i)
    return {
        "conv.lora_A.weight": torch.randn(3, 4, 3, 3, generator=draw),
        "conv.lora_B.weight": torch.randn(20, 3, 1, 1, generator=draw),
        "emb.lora_embedding_A": torch.randn(3, 50, generator=draw),
        "emb.lora_embedding_B": torch.randn(16, 3, generator=draw),
    }


CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "base_model_name_or_path": "org/base"}


def saved(folder: Path, made: list[dict[str, torch.Tensor]], **config: Any) -> list[str]:
    from safetensors.torch import save_file

    for i, state in enumerate(made):
        place = folder / f"lora-{i}"
        place.mkdir(parents=True)
        named = {f"base_model.model.{key}": value for key, value in state.items()}
        save_file(named, place / "adapter_model.safetensors", metadata={"format": "pt"})
        targets = sorted({key.partition(".lora_")[0] for key in state})
        own = {**CONFIG, **config, "target_modules": targets}
        (place / "adapter_config.json").write_text(json.dumps(own))
    return [str(folder / f"lora-{i}") for i in range(len(made))]
