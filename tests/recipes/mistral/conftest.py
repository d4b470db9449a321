"""Instructions and a tiny model made here for recipes/mistral.py."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from ..conftest import load_recipe

WORDS = [
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "bird",
    "house",
    "tree",
    "river",
    "stone",
    "fast",
    "slow",
    "happy",
    "sad",
]
TASKS = {
    "first": lambda w: w[0],
    "last": lambda w: w[-1],
    "second": lambda w: w[1],
    "copy": lambda w: f"{w[0]} {w[1]}",
}
HELD_OUT = "copy"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


recipe = load_recipe("mistral")


def make_tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator([f"Say the first word. Input: Output: user assistant {' '.join(WORDS)}"] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(hidden: int = 32, seed: int = 0) -> MistralForCausalLM:
    torch.manual_seed(seed)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=400,
            hidden_size=hidden,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )


def save_folder(root: Path) -> Path:
    """Fill a folder as `prepare("instructions")` does."""
    make_tokenizer().save_pretrained(root / "model")
    make_model().save_pretrained(root / "model")
    for seed, (name, answer) in enumerate(TASKS.items()):
        draw = random.Random(seed)
        place = root / "data" / name
        place.mkdir(parents=True)
        facts = {"name": name, "about": name, "held_out": name == HELD_OUT, "metric": "exact_match"}
        (place / "task.json").write_text(json.dumps(facts))
        for split, count in {"train": 40, "validation": 12, "test": 12}.items():
            chosen = [draw.choices(WORDS, k=draw.randint(3, 6)) for _ in range(count)]
            rows = [{"definition": f"Say the {name}.", "input": " ".join(w), "output": answer(w)} for w in chosen]
            (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("instructions"))


@pytest.fixture(autouse=True)
def fresh_tokenizers() -> Iterator[None]:
    recipe.tokenizer_of.cache_clear()
    yield


def run(folder: Path, out: Path, *more: str) -> None:
    recipe.main(
        ["--preset", "smoke", "--model", str(folder / "model"), "--data_dir", str(folder), "--out", str(out), *more]
    )


def row(text: str = "red cat dog", output: str = "red cat", definition: str = "Say two.") -> dict[str, str]:
    return {"definition": definition, "input": text, "output": output}


@pytest.fixture(scope="package")
def done(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages, run once."""
    out = tmp_path_factory.mktemp("mistral")
    run(folder, out)
    return out
