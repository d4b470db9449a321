"""recipes/image_classification.py: its arguments, its dry run, and every stage on models and pictures made here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTImageProcessorPil, ViTModel

from subspace_peft import SubspaceBasis, build_basis
from subspace_peft.errors import SubspaceError

RECIPE = Path(__file__).parent.parent / "recipes" / "image_classification.py"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipe_images", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["recipe_images"] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


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


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    save_model(root / "model")
    save_model(root / "dino", "dino")
    for seed, name in enumerate(["one", "two"]):
        save_task(root / "data" / name, seed)
    save_task(root / "data" / "kept", 7, held_out=True)
    return root


def tiny(world: Path, out: Path, *more: str, model: str = "model") -> list[str]:
    given = {
        "model": world / model, "data-dir": world, "out": out, "task": "kept", "train-examples": 32, "validation-examples": 16,
        "source-examples": 32, "epochs": 2, "source-epochs": 1, "rate": 1e-2, "source-rate": 1e-2, "head-rate": 1e-2,
        "basis-k": 4, "r": 2, "sweep": 1, "batch": 16,
    }  # fmt: skip
    typed = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    return [*typed, "--seeds", "1", "2", *more]


@pytest.fixture(scope="module")
def done(recipe: ModuleType, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    recipe.main(tiny(world, out))
    return out


def count_training(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    original = recipe.Trainer.train

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(recipe.Trainer, "train", train)
    return calls


def test_all_stages_leave_adapters_bases_task_and_table(done):
    basis = SubspaceBasis.from_pretrained(done / "basis")
    assert sorted(source["name"] for source in basis.info["sources"]) == ["one", "two"]
    assert SubspaceBasis.from_pretrained(done / "random-basis").shapes() == basis.shapes()
    task = done / "tasks" / "kept-core"
    record = json.loads((task / "recipe.json").read_text())
    assert json.loads((task / "metrics.json").read_text()) == record["result"]["metrics"]
    rows = {r["method"]: r for r in json.loads((done / "compare" / "kept" / "results.json").read_text())["results"]}
    assert list(rows) == ["head only", "mean only", "LoRA r=2", "VeRA", "random basis", "this basis"]
    assert rows["head only"]["trained_adapter"] == 0
    assert all(row["trained_head"] == 2 * 33 for row in rows.values())
    assert rows["this basis"]["trained_adapter"] == 4 * 16
    assert (done / "compare" / "kept" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    # light and dark are easily told apart
    assert rows["head only"]["test"] > 0.9


def test_a_second_call_trains_nothing_and_a_changed_knob_only_what_it_touches(recipe, world, done, monkeypatch):
    calls = count_training(recipe, monkeypatch)
    recipe.main(tiny(world, done))
    assert not calls
    recipe.main(tiny(world, done, "--stage", "train", "--epochs", "1"))
    assert len(calls) == 1


@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_other_encoders_fit_too(recipe, world, tmp_path, pooling):
    out = tmp_path / "out"
    for stage in ("sources", "basis", "train", "evaluate"):
        recipe.main(tiny(world, out, "--stage", stage, "--pooling", pooling, model="dino"))
    assert len(SubspaceBasis.from_pretrained(out / "basis")) == 4


def test_no_backward_reaches_the_layers_below_the_adapters(recipe, world, done):
    args = recipe.shared.parse_knobs(recipe.Knobs, recipe.PRESETS, tiny(world, done, "--layers", "1"))
    args.target_modules = ["q_proj", "v_proj"]
    model = recipe.methods(args)[-1].apply(recipe.make_model(args, 2, 0), recipe.HEAD)
    seen = []
    for name, module in model.named_modules():
        if name.endswith(("layers.0", "layers.1")):
            module.register_forward_hook(lambda m, i, output, n=name: seen.append((n, _first(output).requires_grad)))
    model(pixel_values=torch.randn(2, 3, 16, 16), labels=torch.tensor([0, 1])).loss.backward()
    assert [grad for _, grad in seen] == [False, True]


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def test_a_dry_run_fetches_nothing_and_prints_sizes(recipe, capsys, monkeypatch):
    monkeypatch.setattr(recipe.datasets, "load_dataset", lambda *_: pytest.fail("fetched"))
    recipe.main(["--dry-run"])
    printed = capsys.readouterr().out
    assert "google/vit-base-patch16-224-in21k" in printed
    assert "uoft-cs/cifar100" in printed
    assert "24,576" in printed  # 24 modules of 32 × 32
    assert "group8" in printed


def test_a_hub_set_is_split_into_disjoint_classes(recipe, monkeypatch):
    names = [f"thing{i}" for i in range(10)]
    features = recipe.datasets.Features(
        {"img": recipe.datasets.Image(), "fine_label": recipe.datasets.ClassLabel(names=names)}
    )
    picture = Image.fromarray(np.zeros((8, 8), dtype=np.uint8))
    rows = {"img": [picture] * 40, "fine_label": [i % 10 for i in range(40)]}
    made = recipe.datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(recipe.datasets, "load_dataset", lambda *_: recipe.datasets.DatasetDict(train=made, test=made))
    args = recipe.Knobs(class_groups=2, validation_examples=4)
    (one, first), (two, second) = (recipe.read_task(args, name) for name in ("group0", "group1"))
    assert sorted(first + second) == names
    assert not set(first) & set(second)
    assert {len(one["train"]) + len(one["validation"]), len(two["test"])} == {20}
    assert set(one["train"]["label"]) <= set(range(5))
    whole, labels = recipe.read_task(recipe.Knobs(class_groups=1, validation_examples=4), "all")
    assert len(whole["test"]) == 40
    assert sorted(labels) == names
    with pytest.raises(SubspaceError, match="no column 'image'"):
        recipe.read_task(recipe.Knobs(image_column="image"), "group0")


def break_world(world: Path, how: str) -> list[str]:
    kept = world / "data" / "kept"
    if how == "no image":
        (kept / "train" / "dark" / "000.png").write_bytes(b"words")
    elif how == "empty class":
        for file in (kept / "test" / "light").iterdir():
            file.unlink()
    elif how == "another class":
        (kept / "validation" / "light").rename(kept / "validation" / "bright")
    elif how == "too few":
        return ["--train-examples", "4000"]
    elif how == "unknown task":
        return ["--task", "nothing"]
    elif how == "own adapter":
        return ["--sources", "one", "org/kept-lora"]
    elif how == "wrong modules":
        return ["--target-modules", "nowhere"]
    return []


BAD = {
    "no image": "000.png is no image",
    "empty class": r"test holds images of \['dark'\]",
    "another class": "bright",
    "too few": "4000 are needed",
    "unknown task": "There is no task nothing",
    "own adapter": "own adapter",
    "wrong modules": "nowhere",
}


@pytest.mark.parametrize("how", BAD)
def test_bad_input_is_refused_before_any_training(recipe, world, tmp_path, monkeypatch, how):
    import shutil

    copy = Path(shutil.copytree(world, tmp_path / "world"))
    more = break_world(copy, how)
    calls = count_training(recipe, monkeypatch)
    with pytest.raises((SubspaceError, ValueError), match=BAD[how]):
        recipe.main(tiny(copy, tmp_path / "out", *more))
    assert not calls


def test_a_basis_of_another_model_is_refused_before_any_training(recipe, world, done, tmp_path, monkeypatch):
    wide = {"lora_A": torch.randn(2, 64), "lora_B": torch.randn(64, 2)}
    state = {f"vit.layers.{i}.attention.q_proj.{side}.weight": value for i in range(2) for side, value in wide.items()}
    build_basis([state], k=2, progress=False).save_pretrained(tmp_path / "other")
    calls = count_training(recipe, monkeypatch)
    with pytest.raises(SubspaceError):
        recipe.main(tiny(world, tmp_path / "out", "--basis", str(tmp_path / "other"), "--stage", "train"))
    assert not calls
