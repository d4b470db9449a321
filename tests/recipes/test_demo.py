"""The demo's whole path, on a model and texts made here or on the real ones."""

from __future__ import annotations

import io
import json
import random
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import demo
import numpy as np
import pytest
import torch
from common import fresh_process
from datasets import load_dataset
from demo_parts import sources
from demo_parts.results import headline
from offline.texts import Row, TextTask
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
)

from subspace_peft import SubspaceBasis

from .. import fresh
from .conftest import REAL_CACHE


def make_encoder(folder: Path, words: list[str]) -> Path:
    """Save a thin encoder of MiniLM's width and depth, and a tokenizer of whole words."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder)
    return folder


def make_task(name: str, words: list[str], seed: int) -> TextTask:
    """Make texts whose class is their first word's."""
    draw = random.Random(seed)
    texts = {" ".join(draw.choices(words, k=6)) for _ in range(300)}
    return TextTask(name, "", [Row(text, "ab"[words.index(text.split()[0]) % 2]) for text in sorted(texts)])


@pytest.fixture(scope="module", params=["made here", pytest.param("real", marks=pytest.mark.slow)])
def ran(request, tmp_path_factory):
    """A quick demo, on a model and texts made here or on the real ones.

    Its folder, what the first stage returned and left, the results of the whole, and what was printed.
    """
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUBSPACE_PEFT_CACHE", str(REAL_CACHE))
        if request.param == "made here":
            words = [f"word{i}" for i in range(40)]
            encoder = make_encoder(folder / "encoder", words)
            tasks = [make_task(f"task{seed}", words, seed) for seed in range(9)]
            patch.setattr(demo, "fetch_all", lambda *_, **__: {})
            patch.setattr(sources, "fetch", lambda _: encoder)
            patch.setattr(sources, "find", lambda *_: encoder / "config.json")
            patch.setattr(sources, "source_tasks", lambda: tasks[:8])
            patch.setattr(demo, "held_out_tasks", lambda: tasks[8:])
            forked = SimpleNamespace(run=lambda command, **_: fresh.run(*command[1:]))
            patch.setattr(fresh_process, "subprocess", forked)
        with redirect_stdout(io.StringIO()) as first:
            places = demo.run_demo(folder, stage="sources", quick=True, progress=False)
        left = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
        with redirect_stdout(io.StringIO()) as second:
            results = demo.run_demo(folder, quick=True, progress=False)
    return folder, places, left, results, (first.getvalue(), second.getvalue())


@pytest.fixture
def result(ran):
    """The folder and the results of the whole demo."""
    folder, _, _, results, _ = ran
    return folder, results


def test_the_first_stage_leaves_what_stock_calls_load(ran):
    folder, places, _, _, (said, _) = ran
    assert places["base"] == str(folder / "base")
    assert said.splitlines()[-1] == f"Next: subspace-peft build {folder}/loras/* -k 16 --out my-basis"
    data = load_dataset("json", data_dir=places["data"][0], cache_dir=str(folder / "cache"))
    assert {name: rows.column_names for name, rows in data.items()} == {
        name: ["text", "label"] for name in ("train", "test")
    }
    assert len(data["train"]) == demo.QUICK.train
    words = AutoTokenizer.from_pretrained(places["base"])(data["test"]["text"][:2], return_tensors="pt", padding=True)
    assert AutoModel.from_pretrained(places["base"])(**words).last_hidden_state.shape[-1] == 384
    assert len(places["loras"]) == 8
    for lora in places["loras"][:2]:
        labels = load_file(Path(lora, "adapter_model.safetensors"))["base_model.model.classifier.bias"].numel()
        base = AutoModelForSequenceClassification.from_pretrained(places["base"], num_labels=labels)
        model = PeftModel.from_pretrained(base, lora)
        assert model.peft_config["default"].base_model_name_or_path == places["base"]
        assert model(**words).logits.shape == (2, labels)


def test_the_second_stage_goes_on_from_the_first(ran):
    folder, places, left, *_ = ran
    kept = {file: time for file, time in left.items() if folder / "data" not in file.parents}
    assert any(str(file).startswith(places["loras"][0]) for file in kept)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept


def test_the_demo_measures_every_row_and_writes_what_it_says(result):
    folder, results = result
    for task in results["held_out"]:
        rows = {row["row"]: row for row in task["rows"]}
        assert list(rows) == ["head only", "mean only", "LoRA r=8", "random basis", "this basis"]
        assert rows["LoRA r=8"]["adapter_parameters"] == 6 * 8 * 2 * 384
        assert rows["this basis"]["adapter_parameters"] == rows["random basis"]["adapter_parameters"] == 6 * 16 * 16
        assert rows["mean only"]["adapter_parameters"] == 6
        assert rows["this basis"]["bytes"] < rows["LoRA r=8"]["bytes"] / 10
        assert all(0 <= row["accuracy"] <= 1 and row["seconds"] > 0 and row["curve"] for row in rows.values())
    assert json.loads((folder / "results.json").read_text())["held_out"] == json.loads(json.dumps(results["held_out"]))
    assert results["basis"]["fingerprint"] == SubspaceBasis.from_pretrained(folder / "basis").fingerprint
    assert len(results["basis"]["sources"]) == results["basis"]["seed_groups"] == 8
    for figure in ("spectrum.png", "curves.png"):
        data = (folder / figure).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 10_000
    assert "this basis" in (folder / "table.md").read_text()


def test_the_saved_task_and_its_export_gave_equal_logits_in_fresh_processes(result):
    _, results = result
    for check in results["checks"]:
        assert check["reloaded_max_difference"] < 1e-5
        assert check["exported_max_difference"] < 1e-4
        assert check["logits_scale"] > 0.01
        assert check["exported_rank"] == 16


@pytest.mark.slow
@pytest.mark.parametrize("ran", ["real"], indirect=True)
def test_the_demo_repeats_itself(result, monkeypatch):
    """A second run uses the finished sources again; its own runs, done once more, give the same numbers."""
    folder, results = result
    shutil.rmtree(folder / "runs")
    monkeypatch.setenv("SUBSPACE_PEFT_CACHE", str(REAL_CACHE))
    again = demo.run_demo(folder, quick=True, progress=False)
    timeless = [
        [
            {key: value for key, value in row.items() if key != "seconds"}
            for task in r["held_out"]
            for row in task["rows"]
        ]
        for r in (results, again)
    ]
    assert timeless[0] == timeless[1]
    assert np.isfinite([row["accuracy"] for row in timeless[0]]).all()


def test_the_whole_result_opens_with_the_sentence(ran):
    *_, results, (_, said) = ran
    assert said.startswith("\n" + "\n\n".join(headline(results)) + "\n\n" + results["held_out"][0]["task"])
