"""Models and pictures made here for recipes/image_classification.py."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTImageProcessorPil, ViTModel

from ..conftest import load_recipe, typed


@pytest.fixture(scope="package")
def recipe() -> ModuleType:
    return load_recipe("image_classification")


def save_model(folder: Path, kind: str = "vit", hidden: int = 32) -> Path:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    model = ViTModel(ViTConfig(intermediate_size=48, **sizes)) if kind == "vit" else Dinov2Model(Dinov2Config(**sizes))
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def save_task(folder: Path, seed: int, held_out: bool = False, count: int = 48) -> None:
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(
        json.dumps({"name": folder.name, "labels": ["dark", "light"], "held_out": held_out})
    )
    for split in ("train", "validation", "test"):
        for i in range(count):
            label = ["dark", "light"][i % 2]
            place = folder / split / label
            place.mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(0, 120, (16, 16)) + (100 if label == "light" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i:03}.png")


def save_world(root: Path) -> Path:
    """Two models, two source tasks and a held-out one."""
    save_model(root / "model")
    save_model(root / "dino", "dino")
    for seed, name in enumerate(["one", "two"]):
        save_task(root / "data" / name, seed)
    save_task(root / "data" / "kept", 7, held_out=True)
    return root


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("images"))


def tiny(world: Path, out: Path, *more: str, model: str = "model") -> list[str]:
    given = {
        "model": world / model,
        "data-dir": world,
        "out": out,
        "task": "kept",
        "train-examples": 32,
        "validation-examples": 16,
        "source-examples": 32,
        "epochs": 2,
        "source-epochs": 1,
        "rate": 1e-2,
        "source-rate": 1e-2,
        "head-rate": 1e-2,
        "basis-k": 4,
        "r": 2,
        "sweep": 1,
        "batch": 16,
    }
    return typed(given, *more)


@pytest.fixture(scope="package")
def done(recipe: ModuleType, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    recipe.main(tiny(world, out))
    return out
