"""The demo's tasks: honest splits, no text of another task's, and the pooling they are read with."""

from __future__ import annotations

import pytest
import torch
from offline.texts import Row, TextTask, held_out_tasks, plain, source_tasks
from transformers import BertConfig, BertModel

from subspace_peft.errors import SubspaceError
from subspace_peft.modeling import MeanPooledClassifier

from .conftest import REAL_CACHE


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
