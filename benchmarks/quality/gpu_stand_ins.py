"""Tiny models, tasks and adapters in the place of those that the Hub has, as the recipes' tests make them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from .gpu_plan import Plan

ADAPTERS = 3
WHERE: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def toy_plan(folder: Path) -> Plan:
    """Return the plan that has the stages walk at toy size, on what `make_stand_ins` makes in `folder`."""
    return Plan(
        toy=True,
        folder=folder / "work",
        device="cpu",
        roberta=str(folder / "texts" / "model"),
        vit=str(folder / "pictures" / "model"),
        mistral=str(folder / "instructions" / "model"),
        glue=("kept",),
        images=("kept",),
        instructions=("copy",),
        adapters=tuple(str(folder / "published" / f"stranger-{number}") for number in range(ADAPTERS)),
        bf16=False,
    )


def make_stand_ins(plan: Plan) -> None:
    """Make the models, tasks and adapters that a toy plan names."""
    texts, images, instructions = (
        # the tests are in every checkout, as this file is
        importlib.import_module(f"tests.recipes.{name}.conftest")
        for name in ("glue", "images", "mistral")
    )
    texts.save_world(Path(plan.roberta).parent)
    images.save_world(Path(plan.vit).parent)
    instructions.save_folder(Path(plan.mistral).parent)
    for seed, place in enumerate(plan.adapters):
        base = instructions.make_model()
        torch.manual_seed(seed)
        model = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, **WHERE))
        model.peft_config["default"].base_model_name_or_path = plan.mistral
        model.save_pretrained(place)
