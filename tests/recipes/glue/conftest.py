"""A model and tasks made here for recipes/glue.py."""

from __future__ import annotations

import json
import random
from itertools import chain
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from ..conftest import load_recipe, typed

WORDS = {0: ["bad", "awful", "dull"], 1: ["good", "great", "bright"], "both": ["the", "film", "was", "a", "day"]}


@pytest.fixture(scope="package")
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
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=40,
        pad_token_id=1,
        type_vocab_size=1,
    )
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


def save_world(root: Path) -> Path:
    """A model, three source tasks and two held-out ones, of which one predicts a number."""
    save_model(root / "model")
    for seed, name in enumerate(["one", "two", "three"]):
        save_task(root / "data" / name, seed, pairs=name == "two", number=name == "three")
    save_task(root / "data" / "kept", 7, held_out=True)
    save_task(root / "data" / "kept-number", 8, held_out=True, number=True)
    return root


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("glue"))


def tiny(world: Path, out: Path, *more: str) -> list[str]:
    given = {
        "model": world / "model",
        "data-dir": world,
        "out": out,
        "task": "kept",
        "pooling": "mean",
        "dropout": 0,
        "tokens": 12,
        "train-examples": 32,
        "validation-examples": 16,
        "source-examples": 32,
        "epochs": 2,
        "source-epochs": 1,
        "rate": 1e-2,
        "source-rate": 1e-2,
        "source-r": 2,
        "head-rate": 1e-2,
        "basis-k": 4,
        "r": 2,
        "sweep": 1,
        "warmup": 0,
    }
    return typed(given, *more)


@pytest.fixture(scope="package")
def done(recipe: ModuleType, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    recipe.main(tiny(world, out))
    return out
