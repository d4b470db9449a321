"""A random Mistral of a few numbers, a tokenizer of characters, and prompts, in the place of real ones."""

from __future__ import annotations

import torch
from offline.texts import Row, TextTask
from transformers import MistralConfig, MistralForCausalLM

from benchmarks.quality.language.encoded import EncodedTask, encode, restored
from benchmarks.quality.language.prompts import PromptTask

SIZES = {"train": 24, "validation": 8, "test": 10}
NAMES = ("one", "three", "seventh")
TOP = 2


def tiny_model(layers: int = 4) -> MistralForCausalLM:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=130,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=None,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return MistralForCausalLM(config).eval().requires_grad_(False)


class Characters:
    """A tokenizer whose tokens are characters."""

    eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [min(ord(character), 127) for character in text]}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(i) for i in ids if i != self.eos_token_id or not skip_special_tokens)


def prompts(name: str, words: tuple[str, ...] = ("yes", "no")) -> PromptTask:
    answers = words or ("a few", "the words", "of it")
    rows = [Row(f"{name} {'text ' * (i % 4)}{i}", answers[i % len(answers)]) for i in range(60)]
    return PromptTask(TextTask(name, "about", rows), f"Is {name} so?", words)


def toy(name: str, words: tuple[str, ...] = ("yes", "no")) -> EncodedTask:
    return restored(name, *encode(prompts(name, words), tiny_model(), Characters(), top=TOP, sizes=SIZES))
