"""The basis of the small runs."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def first_basis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from subspace_peft import build_basis

    from ..models import bert, train_lora

    folder = tmp_path_factory.mktemp("first")
    sources = [str(train_lora(bert, folder / f"lora{i}", seed=20 + i, r=2)) for i in range(3)]
    return build_basis(sources, k=4, progress=False).save_pretrained(folder / "basis")


@pytest.fixture(scope="session")
def begun(first_basis: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the task a, on a basis of 5 directions; tests go on in copies of it."""
    from .runs import learn, own_cache

    folder = tmp_path_factory.mktemp("begun")
    with own_cache(folder):
        learn(folder / "run", "a", first_basis)
    return folder / "run"


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    from .runs import copied

    return copied(begun, tmp_path / "run")


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with a tokenizer, three LoRAs of it, and files of texts: `two.csv`, `three.json` and others."""
    import csv
    import json
    import random

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    folder = tmp_path_factory.mktemp("texts")
    words = ["bad", "dull", "good", "great", "film", "plot", "the", "a", "is", "was"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(**shape, vocab_size=len(vocabulary), max_position_embeddings=16)
    BertForSequenceClassification(config).save_pretrained(folder / "base")
    BertTokenizer({word: at for at, word in enumerate(vocabulary)}).save_pretrained(folder / "base")
    for number in range(3):
        model = BertForSequenceClassification.from_pretrained(folder / "base")
        torch.manual_seed(number)
        lora = LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False, task_type="SEQ_CLS")
        get_peft_model(model, lora).save_pretrained(folder / "loras" / str(number))
    draw = random.Random(0)
    for split, count in (("train", 16), ("validation", 8), ("test", 8)):
        rows = []
        for place in range(count):
            label = place % 2
            text = " ".join([*draw.sample(words[4:], 3), draw.choice(words[2 * label : 2 * label + 2])])
            rows.append({"sentence": text, "verdict": ("bad", "good")[label], "kind": place % 3})
        odd = [
            {**row, "one": "x", "id": place * 10**9, "pm": 2 * (place % 2) - 1, "gap": None if place % 8 == 3 else "a"}
            for place, row in enumerate(rows)
        ]
        with open(folder / f"two-{split}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        (folder / f"three-{split}.json").write_text(json.dumps(odd))
    (folder / "empty.csv").write_text("sentence,verdict\n")
    (folder / "empty.json").write_text("[]")
    return folder
