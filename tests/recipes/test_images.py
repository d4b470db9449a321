"""recipes/image_classification.py: its arguments, its dry run, and every stage on models and pictures made here."""

from __future__ import annotations

import json
import re
import shutil
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

from .conftest import RECIPES, load_recipe


@pytest.fixture(scope="module")
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
        "model": world / model, "data-dir": world, "out": out, "task": "kept", "train-examples": 32,
        "validation-examples": 16, "source-examples": 32, "epochs": 2, "source-epochs": 1, "rate": 1e-2,
        "source-rate": 1e-2, "head-rate": 1e-2, "basis-k": 4, "r": 2, "sweep": 1, "batch": 16,
    }  # fmt: skip
    typed = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    return [*typed, "--seeds", "1", "2", *more]


@pytest.fixture(scope="module")
def done(recipe: ModuleType, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    recipe.main(tiny(world, out))
    return out


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
    # its code makes this encoder under this head
    (code,) = re.findall(r"```python\n(.*?)```", (task / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["model"].get_base_model().classifier.modules_to_save["default"].out_features == 2
    # Light and dark are easily told apart with an adapter; for the head alone, these few steps suffice on some random encoders only,
    # and which one a seed gives differs between releases of transformers.
    assert all(row["test"] > 0.9 for method, row in rows.items() if method != "head only")
    assert rows["head only"]["test"] > 0.6


def test_a_second_call_trains_nothing_and_a_changed_knob_only_what_it_touches(recipe, world, done, trained):
    recipe.main(tiny(world, done))
    assert not trained
    recipe.main(tiny(world, done, "--stage", "train", "--epochs", "1"))
    assert len(trained) == 1


def test_an_interrupted_training_goes_on_from_its_checkpoint(recipe, world, done, tmp_path, monkeypatch):
    def whole(out: Path) -> dict[str, Any]:
        more = ["--stage", "train", "--basis", str(done / "basis"), "--epochs", "3", "--flip", "True"]
        recipe.main(tiny(world, out, *more))
        return json.loads((out / "tasks" / "kept-core" / "recipe.json").read_text())["result"]

    expected = whole(tmp_path / "whole")
    epochs: list[int] = []
    original = recipe.LabelledTask.measure

    def interrupted(self: Any, prediction: Any) -> dict[str, float]:
        epochs.append(1)
        if len(epochs) == 2:
            raise KeyboardInterrupt
        return original(self, prediction)

    with monkeypatch.context() as patch:
        patch.setattr(recipe.LabelledTask, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            whole(tmp_path / "cut")
    (checkpoints,) = (tmp_path / "cut" / "checkpoints").glob("kept-core-*")
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-2"]
    resumed = whole(tmp_path / "cut")
    assert (resumed["curve"], resumed["metrics"]) == (expected["curve"], expected["metrics"])
    weights = [tmp_path / name / "tasks" / "kept-core" / "adapter_model.safetensors" for name in ("whole", "cut")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not checkpoints.exists()


@pytest.mark.parametrize(
    "more",
    [["factor"], ["diagonal"], ["none", "--mean-gain", "trainable"], ["core", "--k", "2", "--mean-gain", "fixed"]],
    ids=" ".join,
)
def test_every_kind_of_coefficients_trains_and_evaluates(recipe, world, done, tmp_path, more):
    for stage in ("train", "evaluate"):
        basis = ["--basis", str(done / "basis"), "--epochs", "1", "--stage", stage]
        recipe.main(tiny(world, tmp_path, *basis, "--coefficients", *more))
    assert (tmp_path / "tasks" / f"kept-{more[0]}" / "metrics.json").is_file()


@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_other_encoders_fit_too(recipe, world, tmp_path, pooling):
    out = tmp_path / "out"
    for stage in ("sources", "basis", "train", "evaluate"):
        recipe.main(tiny(world, out, "--stage", stage, "--pooling", pooling, model="dino"))
    assert len(SubspaceBasis.from_pretrained(out / "basis")) == 4


def test_no_backward_reaches_the_layers_below_the_adapters(recipe, world, done):
    args = recipe.shared.parse_knobs(recipe.Knobs, recipe.PRESETS, tiny(world, done, "--layers", "1"))
    args.target_modules = ["q_proj", "v_proj"]
    model = recipe.RECIPE.methods(args, recipe.known_tasks(args))[-1].apply(recipe.make_model(args, 2, 0), recipe.HEAD)
    seen = []
    for name, module in model.named_modules():
        if name.endswith(("layers.0", "layers.1")):
            module.register_forward_hook(lambda m, i, output, n=name: seen.append((n, _first(output).requires_grad)))
    model(pixel_values=torch.randn(2, 3, 16, 16), labels=torch.tensor([0, 1])).loss.backward()
    assert [grad for _, grad in seen] == [False, True]


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("kind", ["vit", "dino"])
@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_the_head_sees_the_last_norms_output(recipe, world, kind, pooling):
    args = recipe.Knobs(model=str(world / ("model" if kind == "vit" else kind)), pooling=pooling)
    model = recipe.make_model(args, 3, seed=0).eval()
    images = torch.randn(2, 3, 16, 16)
    encoder = {"vit": ViTModel, "dino": Dinov2Model}[kind].from_pretrained(args.model).eval()
    with torch.no_grad():
        hidden = encoder(pixel_values=images).last_hidden_state
        expected = model.classifier(hidden[:, 0] if pooling == "class" else hidden[:, 1:].mean(1))
        assert torch.equal(model(pixel_values=images).logits, expected)
    assert recipe.find_targets(args, model) == ["q_proj", "v_proj"]


def test_older_names_of_the_attention_are_found_too(recipe):
    old = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("query", "key", "value")})
    assert recipe.find_targets(recipe.Knobs(), old) == ["query", "value"]
    with pytest.raises(SubspaceError, match="name --target_modules of w_k, w_q"):
        recipe.find_targets(recipe.Knobs(), torch.nn.ModuleDict({f"w_{n}": torch.nn.Linear(2, 2) for n in "qk"}))


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.array([[0, 128, 255]], dtype=np.uint8), [0, 128, 255]),
        (np.array([[0, 128 * 256, 65535]], dtype=np.uint16), [0, 128, 255]),
        (np.array([[0, 128 * 256, 65535]], dtype=np.int32), [0, 128, 255]),
        (np.array([[[7, 8, 9, 255]]], dtype=np.uint8), [7]),
    ],
    ids=["grey", "16-bit grey", "wide grey", "with alpha"],
)
def test_images_of_other_kinds_become_rgb(recipe, pixels, expected):
    made = recipe.shared.rgb(Image.fromarray(pixels))
    assert made.mode == "RGB"
    assert np.asarray(made)[0, :, 0].tolist() == expected


def test_training_images_alone_are_flipped(recipe, world):
    args = recipe.shared.parse_knobs(recipe.Knobs, recipe.PRESETS, tiny(world, world, "--flip", "True"))
    task = recipe.load_task(args, "kept")
    torch.manual_seed(0)
    seen = {split: torch.stack([task.splits[split][0]["pixel_values"] for _ in range(20)]) for split in task.splits}
    assert len(seen["train"].unique(dim=0)) == 2
    assert any(torch.equal(seen["train"][0].flip(-1), other) for other in seen["train"])
    assert len(seen["validation"].unique(dim=0)) == len(seen["test"].unique(dim=0)) == 1


# -- the dry run -----------------------------------------------------------------------------------------------------


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
        assert set(preset) <= set(vars(recipe.Knobs()))


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
    args = recipe.Knobs(class_groups=2, validation_examples=4, image_column=column)
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
    splits, _ = recipe.read_task(recipe.Knobs(class_groups=2, validation_examples=4), "group0")
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [16, 4, 10]


@pytest.mark.parametrize(
    ("knobs", "splits", "says"),
    [
        ({"image_column": "picture"}, ["train", "test"], "no column 'picture'; there are img, fine_label, label"),
        ({"label_column": "label"}, ["train", "test"], "'label' has no class names"),
        ({"class_groups": 6}, ["train", "test"], "group5 would have 1 of 10 classes"),
        ({"class_groups": 2}, ["train"], "no split validation; it has train"),
    ],
)
def test_hub_sets_that_do_not_fit_are_refused(recipe, monkeypatch, knobs, splits, says):
    hub_set(recipe, monkeypatch, **dict.fromkeys(splits, 20))
    args = recipe.Knobs(**knobs)
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
    import subprocess

    typed = [sys.executable, str(RECIPES / "image_classification.py"), "--data-dir", str(world), "--task", "nope"]
    said = subprocess.run(typed, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    # bitsandbytes, where installed, has a line of its own on some CPUs
    said_by_us = [line for line in said.stderr.splitlines() if line.strip() and "kernels-community" not in line]
    assert said.returncode == 1 and len(said_by_us) == 1, said.stderr
    assert said_by_us[0].startswith("error: There is no task nope")
