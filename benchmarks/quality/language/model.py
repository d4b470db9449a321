"""SmolLM2's frozen lower layers, and its top ones as a model of their own that takes what the lower ones give."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from offline.models import mistral_lm
from torch import nn
from transformers import DynamicCache

from .setting import TOP


@cache
def whole_model(folder: Path) -> tuple[Any, Any]:
    """Return SmolLM2-135M-Instruct, a frozen `MistralForCausalLM` in float32 kept in `folder`, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    home = str(mistral_lm(folder / "smollm2"))
    model = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32)
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(home)


def part_of(model: Any, begin: int, end: int, *, last: bool) -> Any:
    """Return layers `begin` to `end` of a causal language model as a model of its class, on the same tensors.

    It is made in milliseconds, since nothing is copied; PEFT may change its modules without changing those of `model`.

    Args:
        model: a `LlamaForCausalLM` or `MistralForCausalLM`.
        begin, end: of its layers, as of a slice.
        last: whether the model's norm stands behind the last layer; else nothing does.
    """
    config = type(model.config).from_dict({**model.config.to_dict(), "num_hidden_layers": end - begin})
    config._attn_implementation = model.config._attn_implementation
    with init_empty_weights(include_buffers=False):
        part = type(model)(config)
    kept = {}
    for key, value in model.state_dict().items():
        head, mark, tail = key.partition("model.layers.")
        if not mark:
            kept[key] = value
        elif begin <= (place := int(tail.split(".")[0])) < end:
            kept[f"{head}{mark}{place - begin}.{tail.split('.', 1)[1]}"] = value
    part.load_state_dict(kept, assign=True)
    if not last:
        part.model.norm = nn.Identity()
    return part.eval().requires_grad_(False)


def top_of(model: Any, top: int = TOP) -> Any:
    """Return the `top` highest layers with norm and vocabulary head."""
    layers = model.config.num_hidden_layers
    return part_of(model, layers - top, layers, last=True)


def bottom_of(model: Any, top: int = TOP) -> Any:
    """Return all layers below the `top` highest, without a norm behind them."""
    return part_of(model, 0, model.config.num_hidden_layers - top, last=False)


def after_prefix(decoder: Any, prefix: torch.Tensor, rest: torch.Tensor) -> tuple[torch.Tensor, DynamicCache]:
    """Return the decoder's outputs (n, length, d) on `rest`, each row of which follows `prefix`, and the cache.

    The prefix is computed once. A position sees nothing that comes after it, so what pads a row on the right changes
    nothing on its left, and no mask is needed.

    Args:
        decoder: the `model` inside a causal language model.
        prefix: (1, p, d) inputs, with gradients where adapters are trained.
        rest: (n, length, d) inputs.
    """
    past = DynamicCache()
    decoder(inputs_embeds=prefix, past_key_values=past, use_cache=True)
    past.batch_repeat_interleave(len(rest))
    out = decoder(inputs_embeds=rest, past_key_values=past, use_cache=True)
    return out.last_hidden_state, past
