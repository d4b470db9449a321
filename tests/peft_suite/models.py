"""Tiny random models of the architectures that PEFT's tests name, in place of those they would download."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers as hf
from torch import nn

VOCABULARY = 1024
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**SMALL, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "pad_token_id": 0}
ENCODER = {**SMALL, "vocab_size": VOCABULARY}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
GEMMA = {**DECODER, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}

# what each id of a repository stands for: the model's class and its configuration's keywords
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "OPTForCausalLM",
        # the original's own sizes: tests count its numbers and name its width
        {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 4, "num_hidden_layers": 5, "num_attention_heads": 4},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", GPT),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {**GPT, "rotary_dim": 4}),
    # as many keys as queries, as in the original: LoRA's own rows merge at a rank that fewer would not have
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", {**DECODER, "num_key_value_heads": 4}),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", DECODER),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", {**DECODER, "head_dim": 8}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", GEMMA),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", DECODER),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": VOCABULARY,
            "decoder_start_token_id": 0,
        },
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        {
            **{
                f"{side}_{what}": n
                for side in ("encoder", "decoder")
                for what, n in (("layers", 2), ("ffn_dim", 64), ("attention_heads", 4))
            },
            "d_model": 32,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 128,
        },
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", ENCODER),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", ENCODER),
    "peft-internal-testing/tiny-random-DebertaModel": (
        "DebertaModel",
        {**ENCODER, "relative_attention": True, "pos_att_type": "c2p|p2c"},
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": (
        "DebertaV2Model",
        {**ENCODER, "relative_attention": True, "pos_att_type": "c2p|p2c"},
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", ENCODER),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        ENCODER,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", DECODER),
}

# adapters that the tests of configurations load, all of them LoRA; the second at a revision
ADAPTERS = {"ybelkada/test-st-lora": "main", "peft-internal-testing/tiny-opt-lora-revision": "test"}


def make(name: str) -> nn.Module:
    """The model that stands for the repository `name`; the same numbers at every call."""
    kind, keywords = MODELS[name]
    cls = getattr(hf, kind)
    torch.manual_seed(0)
    return cls(cls.config_class(**keywords)).eval()


def save_all(folder: Path) -> dict[str, dict[str, Path]]:
    """Write every model and adapter below `folder`; returns id → revision → its folder, as the tests' Hub serves
    it."""
    repos: dict[str, dict[str, Path]] = {}
    for name in MODELS:
        make(name).save_pretrained(folder / name)
        repos[name] = {"main": folder / name}
    for name, revision in ADAPTERS.items():
        (folder / name).mkdir(parents=True)
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "target_modules": ["q_proj", "v_proj"]}
        (folder / name / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        repos[name] = {revision: folder / name}
    return repos
