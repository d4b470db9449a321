"""recipes/glue.py: every stage on a model and tasks made here."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from common import RUN_KEYS
from common.stages import put_beside_controls
from peft import PeftModel
from transformers import (
    AutoModel,
    RobertaForSequenceClassification,
)

from subspace_peft import SubspaceBasis, build_basis
from subspace_peft.modeling import MeanPooledClassifier

from ... import fresh
from ..conftest import goes_on_from_its_checkpoint
from .conftest import save_model, tiny


def test_all_stages_leave_adapters_bases_task_and_table(done):
    assert sorted(path.name for path in (done / "sources").iterdir()) == ["one", "three", "two"]
    basis = SubspaceBasis.from_pretrained(done / "basis")
    assert sorted(source["name"] for source in basis.info["sources"]) == ["one", "three", "two"]
    assert len({source["seed_group"] for source in basis.info["sources"]}) == 3
    assert SubspaceBasis.from_pretrained(done / "random-basis").shapes() == basis.shapes()
    task = done / "tasks" / "kept-core"
    record = json.loads((task / "recipe.json").read_text())
    assert set(RUN_KEYS) - {"trained_adapter", "trained_head", "bytes"} <= set(record["result"])
    # loaded in the plain way, the saved task scores what the trained one did
    assert json.loads((task / "metrics.json").read_text()) == record["result"]["metrics"]
    assert [path.name for path in (done / "tasks").iterdir()] == ["kept-core"]
    body = json.loads((done / "compare" / "kept" / "results.json").read_text())
    rows = {row["method"]: row for row in body["results"]}
    assert list(rows) == ["head only", "mean only", "LoRA r=2", "VeRA", "random basis", "this basis"]
    assert all(len(row["tests"]) == 2 and row["diverged"] == 0 for row in rows.values())
    assert {name: row["trained_adapter"] for name, row in rows.items()} == {
        "head only": 0,
        "mean only": 4,
        "LoRA r=2": 4 * 2 * 64,
        "VeRA": 4 * (32 + 256),
        "random basis": 64,
        "this basis": 64,
    }
    assert all(row["trained_head"] == 2 * 32 + 2 for row in rows.values())
    assert "| this basis |" in (done / "compare" / "kept" / "table.md").read_text()
    assert (done / "compare" / "kept" / "curves.png").stat().st_size > 1000


def test_the_tasks_card_tells_its_training_and_its_controls(done):
    card = (done / "tasks" / "kept-core" / "README.md").read_text()
    rows = {
        row["method"]: row for row in json.loads((done / "compare" / "kept" / "results.json").read_text())["results"]
    }
    for name, row in rows.items():
        assert f"| {name} | {row['test']:.3f} ± {row['test_sd']:.3f} | 2 | {row['trained_adapter']:,} |" in card
    tested = json.loads((done / "tasks" / "kept-core" / "recipe.json").read_text())["result"]["metrics"]["test"]
    # the recipe's optimizer has rates of its own, which the Trainer's arguments do not know
    for line in (
        "| learning rate of the coefficients | 0.01 |",
        "| training examples | 32 |",
        f"| test | accuracy | {tested['accuracy']:.4g} |",
    ):
        assert line in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "MeanPooledClassifier" in code
    # the card says no place of this machine: its code runs beside the task
    fresh.run("-c", code, check=True, cwd=done / "tasks")


def test_controls_of_other_settings_are_not_put_into_a_card(done, tmp_path):
    task, comparison = (
        shutil.copytree(done / "tasks" / "kept-core", tmp_path / "tasks" / "task"),
        done / "compare" / "kept",
    )
    shutil.copytree(done / "basis", tmp_path / "basis")
    settings = json.loads((comparison / "results.json").read_text())["settings"]
    model = PeftModel.from_pretrained(MeanPooledClassifier(AutoModel.from_pretrained(settings["model"])), task)
    for config in model.peft_config.values():
        config.card = None
    model.save_pretrained(task)
    put_beside_controls(task, comparison, {**settings, "epochs": 9})
    assert "## Beside" not in (task / "README.md").read_text()
    put_beside_controls(tmp_path, comparison, settings)
    assert not (tmp_path / "README.md").exists()
    put_beside_controls(task, comparison, settings)
    assert "## Beside" in (task / "README.md").read_text()


def test_what_is_done_is_not_done_again(recipe, world, done, trained):
    table = (done / "compare" / "kept" / "table.md").read_bytes()
    recipe.main(tiny(world, done))
    assert trained == [] and (done / "compare" / "kept" / "table.md").read_bytes() == table


def test_another_budget_is_done_again(recipe, world, done, trained):
    recipe.main(tiny(world, done, "--stage", "train", "--rate", "0.02"))
    assert len(trained) == 1
    recipe.main(tiny(world, done, "--stage", "train"))
    assert len(trained) == 2


def test_only_missing_runs_are_done(recipe, world, done, trained):
    next((done / "cells").glob("vera-*-seed1-*.json")).unlink()
    recipe.main(tiny(world, done, "--stage", "compare"))
    assert len(trained) == 1


def test_sources_that_are_finished_are_kept(recipe, world, done, trained):
    (done / "sources" / "two" / "recipe.json").unlink()
    before = (done / "sources" / "one" / "adapter_model.safetensors").stat().st_mtime_ns
    again = (done / "sources" / "two" / "adapter_model.safetensors").read_bytes()
    recipe.main(tiny(world, done, "--stage", "sources"))
    assert len(trained) == 1
    assert (done / "sources" / "one" / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert (done / "sources" / "two" / "adapter_model.safetensors").read_bytes() == again


def test_an_interrupted_training_goes_on_from_its_checkpoint(recipe, world, done, tmp_path, monkeypatch):
    common = ["--stage", "train", "--basis", str(done / "basis"), "--epochs", "3"]
    goes_on_from_its_checkpoint(recipe, lambda out: tiny(world, out, *common), tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "more",
    [
        ["--coefficients", "factor", "--k", "3"],
        ["--coefficients", "diagonal", "--mean-gain", "trainable"],
        ["--coefficients", "directions"],
        ["--coefficients", "none"],
        ["--scheduler", "reduce_lr_on_plateau", "--weight-decay", "0.1"],
        ["--task", "kept-number", "--mean-gain", "fixed"],
    ],
)
def test_every_kind_of_coefficients_trains_and_evaluates(more, recipe, world, done, tmp_path):
    if "directions" in more:
        built = build_basis(
            [str(done / "sources" / name) for name in ("one", "two")], k=4, directions=2, progress=False
        )
        built.save_pretrained(tmp_path / "basis")
    basis = tmp_path / "basis" if "directions" in more else done / "basis"
    common = tiny(world, tmp_path, "--basis", str(basis), *more)
    recipe.main([*common, "--stage", "train"])
    recipe.main([*common, "--stage", "evaluate"])
    (task,) = (tmp_path / "tasks").iterdir()
    metrics = json.loads((task / "metrics.json").read_text())["test"]
    assert set(metrics) == ({"score", "pearson", "spearmanr"} if "kept-number" in more else {"score", "accuracy"})


def test_the_first_tokens_head_of_transformers_itself(recipe, world, tmp_path):
    save_model(tmp_path / "model", RobertaForSequenceClassification)
    more = ["--pooling", "first", "--model", str(tmp_path / "model"), "--layers", "1", "--sources", "one", "two"]
    for stage in ("sources", "basis", "train", "evaluate"):
        recipe.main(tiny(world, tmp_path, *more, "--stage", stage))
    assert len(SubspaceBasis.from_pretrained(tmp_path / "basis")) == 2
