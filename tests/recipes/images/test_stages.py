"""recipes/image_classification.py: every stage, head and layer on models and pictures made here."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Model, ViTModel

from subspace_peft import SubspaceBasis
from subspace_peft.errors import SubspaceError

from ..conftest import goes_on_from_its_checkpoint
from .conftest import tiny


def test_all_stages_leave_adapters_bases_task_and_table(done, monkeypatch):
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
    monkeypatch.chdir(done / "tasks")
    exec(code, names)
    assert names["model"].get_base_model().classifier.modules_to_save["default"].out_features == 2
    # Light and dark are easily told apart with an adapter; for the head alone, these few steps suffice on some random
    # encoders only, and which one a seed gives differs between releases of transformers.
    assert all(row["test"] > 0.9 for method, row in rows.items() if method != "head only")
    assert rows["head only"]["test"] > 0.6


def test_a_second_call_trains_nothing_and_a_changed_argument_only_what_it_touches(recipe, world, done, trained):
    recipe.main(tiny(world, done))
    assert not trained
    recipe.main(tiny(world, done, "--stage", "train", "--epochs", "1"))
    assert len(trained) == 1


@pytest.mark.slow
def test_an_interrupted_training_goes_on_from_its_checkpoint(recipe, world, done, tmp_path, monkeypatch):
    common = ["--stage", "train", "--basis", str(done / "basis"), "--epochs", "3", "--flip", "True"]
    goes_on_from_its_checkpoint(recipe, lambda out: tiny(world, out, *common), tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "more",
    [
        ["core", "--k", "2", "--mean-gain", "fixed"],
        *(
            pytest.param(more, marks=pytest.mark.slow)
            for more in (["factor"], ["diagonal"], ["none", "--mean-gain", "trainable"])
        ),
    ],
    ids=" ".join,
)
def test_every_kind_of_coefficients_trains_and_evaluates(recipe, world, done, tmp_path, more):
    for stage in ("train", "evaluate"):
        basis = ["--basis", str(done / "basis"), "--epochs", "1", "--stage", stage]
        recipe.main(tiny(world, tmp_path, *basis, "--coefficients", *more))
    assert (tmp_path / "tasks" / f"kept-{more[0]}" / "metrics.json").is_file()


@pytest.mark.parametrize("pooling", [pytest.param("class", marks=pytest.mark.slow), "mean"])
def test_other_encoders_fit_too(recipe, world, tmp_path, pooling):
    out = tmp_path / "out"
    for stage in ("sources", "basis", "train", "evaluate"):
        recipe.main(tiny(world, out, "--stage", stage, "--pooling", pooling, model="dino"))
    assert len(SubspaceBasis.from_pretrained(out / "basis")) == 4


def test_no_backward_reaches_the_layers_below_the_adapters(recipe, world, done):
    args = recipe.shared.parse_arguments(recipe.Arguments, recipe.PRESETS, tiny(world, done, "--layers", "1"))
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
    args = recipe.Arguments(model=str(world / ("model" if kind == "vit" else kind)), pooling=pooling)
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
    assert recipe.find_targets(recipe.Arguments(), old) == ["query", "value"]
    with pytest.raises(SubspaceError, match="name --target_modules of w_k, w_q"):
        recipe.find_targets(recipe.Arguments(), torch.nn.ModuleDict({f"w_{n}": torch.nn.Linear(2, 2) for n in "qk"}))


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
    args = recipe.shared.parse_arguments(recipe.Arguments, recipe.PRESETS, tiny(world, world, "--flip", "True"))
    task = recipe.load_task(args, "kept")
    torch.manual_seed(0)
    seen = {split: torch.stack([task.splits[split][0]["pixel_values"] for _ in range(20)]) for split in task.splits}
    assert len(seen["train"].unique(dim=0)) == 2
    assert any(torch.equal(seen["train"][0].flip(-1), other) for other in seen["train"])
    assert len(seen["validation"].unique(dim=0)) == len(seen["test"].unique(dim=0)) == 1
