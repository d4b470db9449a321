"""recipes/image_classification.py: the dry run, Hub sets, bad input."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTModel

from subspace_peft import build_basis
from subspace_peft.errors import SubspaceError

from ... import fresh
from ..conftest import RECIPES
from .conftest import tiny


def test_dry_run_of_the_real_thing(dry, no_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = dry()
    assert "model google/vit-base-patch16-224-in21k" in said
    assert "data uoft-cs/cifar100" in said
    assert "24 modules" in said
    # 5,000 images of ten classes, of which 400 are carved out
    for line in ("source group8: 720", "train: 1,440", "LoRA r=8: 294,912", "VeRA: 24,576", "this basis: 24,576"):
        assert line in said
    assert "the head: 7,690" in said
    assert "source group9" not in said
    assert list(tmp_path.iterdir()) == []


def test_dry_run_does_not_guess_what_only_fetching_would_tell(dry, no_network):
    assert "not known yet" in dry("--model", "facebook/dinov2-base", "--pooling", "mean")
    assert "is not known before it is fetched" in dry("--data", "org/birds", "--task", "group0")


def test_dry_run_of_local_data_and_of_the_offline_preset(world, dry, no_network, tmp_path):
    said = dry(*tiny(world, tmp_path / "out"))
    assert "nothing: all of it is here" in said
    assert "this basis: 64 = 256 bytes" in said
    assert not (tmp_path / "out").exists()
    # the cache of a test is empty
    assert "Would fetch" in dry("--preset", "offline")


def test_a_yaml_file_and_presets(recipe, world, dry, no_network, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(f"model: {world / 'model'}\ndata_dir: {world}\ntask: kept\nbasis_k: 3\nlayers: [1]\n")
    assert "this basis: 18 = 72 bytes" in dry(str(file))
    for preset in recipe.PRESETS.values():
        assert set(preset) <= set(vars(recipe.Arguments()))


# -- Hub sets --------------------------------------------------------------------------------------------------------


def hub_set(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, column: str = "img", **splits: int) -> list[str]:
    """Have load_dataset return splits of so many images of ten classes; returns the classes."""
    names = [f"thing{i}" for i in range(10)]
    features = recipe.datasets.Features(
        {column: recipe.datasets.Image(), "fine_label": recipe.datasets.ClassLabel(names=names)}
        | {"label": recipe.datasets.Value("int64")}
    )
    picture = Image.fromarray(np.zeros((8, 8), dtype=np.uint8))
    made = recipe.datasets.DatasetDict()
    for split, count in splits.items():
        labels = [i % 10 for i in range(count)]
        rows = {column: [picture] * count, "fine_label": labels, "label": labels}
        made[split] = recipe.datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(recipe.datasets, "load_dataset", lambda *_: made)
    return names


@pytest.mark.parametrize("column", ["img", "image"])
def test_a_hub_set_is_split_into_disjoint_classes(recipe, monkeypatch, column):
    names = hub_set(recipe, monkeypatch, column, train=40, test=40)
    args = recipe.Arguments(class_groups=2, validation_examples=4, image_column=column)
    (one, first), (two, second) = (recipe.read_task(args, name) for name in ("group0", "group1"))
    assert sorted(first + second) == names
    assert not set(first) & set(second)
    assert {len(one["train"]) + len(one["validation"]), len(two["test"])} == {20}
    assert set(one["train"]["label"]) <= set(range(5))
    assert sorted(one["train"].column_names) == ["image", "label"]
    args.class_groups = 1
    whole, labels = recipe.read_task(args, "all")
    assert len(whole["test"]) == 40
    assert sorted(labels) == names


def test_a_hub_sets_own_validation_split_is_its_test_where_it_has_no_other(recipe, monkeypatch):
    hub_set(recipe, monkeypatch, train=40, validation=20)
    splits, _ = recipe.read_task(recipe.Arguments(class_groups=2, validation_examples=4), "group0")
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [16, 4, 10]


@pytest.mark.parametrize(
    ("given", "splits", "says"),
    [
        ({"image_column": "picture"}, ["train", "test"], "no column 'picture'; there are img, fine_label, label"),
        ({"label_column": "label"}, ["train", "test"], "'label' has no class names"),
        ({"class_groups": 6}, ["train", "test"], "group5 would have 1 of 10 classes"),
        ({"class_groups": 2}, ["train"], "no split validation; it has train"),
    ],
)
def test_hub_sets_that_do_not_fit_are_refused(recipe, monkeypatch, given, splits, says):
    hub_set(recipe, monkeypatch, **dict.fromkeys(splits, 20))
    args = recipe.Arguments(**given)
    with pytest.raises(SubspaceError, match=says):
        recipe.read_task(args, f"group{args.class_groups - 1}")


# -- bad input -------------------------------------------------------------------------------------------------------


def break_world(world: Path, how: str) -> list[str]:
    kept = world / "data" / "kept"
    if how == "no image":
        (kept / "train" / "dark" / "000.png").write_bytes(b"words")
    elif how == "truncated image":
        file = kept / "test" / "dark" / "000.png"
        file.write_bytes(file.read_bytes()[:-40])
    elif how == "no such split":
        shutil.rmtree(kept / "validation")
    elif how == "empty class":
        for file in (kept / "test" / "light").iterdir():
            file.unlink()
    elif how == "another class":
        (kept / "validation" / "light").rename(kept / "validation" / "bright")
    return TYPED.get(how, [])


TYPED = {
    "too few": ["--train-examples", "4000"],
    "too few validation images": ["--validation-examples", "4000"],
    "unknown task": ["--task", "nothing"],
    "unknown source": ["--sources", "one", "nothing"],
    "the task as its own source": ["--sources", "one", "kept"],
    "own adapter": ["--sources", "one", "org/kept-lora"],
    "wrong modules": ["--target-modules", "nowhere"],
    "no such layer": ["--layers", "7"],
    "no such folder": ["--data-dir", "/nowhere"],
}
BAD = {
    "no image": "000.png is no image",
    "truncated image": "000.png is no image",
    "empty class": r"test holds images of \['dark'\]",
    "another class": "bright",
    "no such split": r"validation holds images of \[\]",
    "too few": "4000 are needed",
    "too few validation images": "4000 are needed",
    "unknown task": "There is no task nothing",
    "unknown source": "There is no task nothing",
    "the task as its own source": "own adapter",
    "own adapter": "own adapter",
    "wrong modules": "nowhere",
    "no such layer": "No modules were targeted|layers",
    "no such folder": "no data/<task>/task.json",
}


@pytest.mark.parametrize("how", BAD)
def test_bad_input_is_refused_before_any_training(recipe, world, tmp_path, trained, how):
    copy = Path(shutil.copytree(world, tmp_path / "world"))
    more = break_world(copy, how)
    with pytest.raises((SubspaceError, ValueError), match=BAD[how]):
        recipe.main(tiny(copy, tmp_path / "out", *more))
    assert not trained


def test_a_basis_of_another_model_is_refused_before_any_training(recipe, world, done, tmp_path, trained):
    wide = {"lora_A": torch.randn(2, 64), "lora_B": torch.randn(64, 2)}
    state = {f"vit.layers.{i}.attention.q_proj.{side}.weight": value for i in range(2) for side, value in wide.items()}
    build_basis([state], k=2, progress=False).save_pretrained(tmp_path / "other")
    with pytest.raises(SubspaceError):
        recipe.main(tiny(world, tmp_path / "out", "--basis", str(tmp_path / "other"), "--stage", "train"))
    assert not trained


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ("basis", "run --stage sources first"),
        ("train", "run --stage basis first"),
        ("evaluate", "run --stage train first"),
        ("compare", "run --stage basis first"),
    ],
)
def test_a_stage_without_its_predecessor_says_which(recipe, world, tmp_path, stage, says):
    with pytest.raises(SubspaceError, match=says):
        recipe.main(tiny(world, tmp_path, "--stage", stage))


def test_a_basis_that_knows_the_task_is_refused(recipe, world, done, tmp_path, trained):
    for stage in ("train", "compare"):
        with pytest.raises(SubspaceError, match="must not hold that task's own adapter, but one is"):
            recipe.main(tiny(world, tmp_path, "--stage", stage, "--task", "one", "--basis", str(done / "basis")))
    assert not trained


def test_a_task_of_another_base_model_is_not_evaluated(recipe, world, done, tmp_path):
    model = ViTModel.from_pretrained(world / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    shutil.copytree(world / "model", tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(SubspaceError, match="base model's weights are not those"):
        recipe.main(tiny(world, done, "--stage", "evaluate", "--model", str(tmp_path / "model")))


def test_run_as_a_script_an_error_is_one_line(world, tmp_path):
    typed = [str(RECIPES / "image_classification.py"), "--data-dir", str(world), "--task", "nope"]
    said = fresh.run(*typed, cwd=tmp_path)
    # bitsandbytes, where installed, has a line of its own on some CPUs
    said_by_us = [line for line in said.stderr.splitlines() if line.strip() and "kernels-community" not in line]
    assert said.returncode == 1 and len(said_by_us) == 1, said.stderr
    assert said_by_us[0].startswith("error: There is no task nope")
