"""Greedy answers of the whole model, its lower layers as they were and its top ones as a cell trained them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from .answers import causal
from .encoded import EncodedTask
from .model import after_prefix


@torch.no_grad()
def greedy(
    model: nn.Module, bottom: Any, task: EncodedTask, *, end: int, count: int, new_tokens: int
) -> list[list[int]]:
    """Return the token ids that greedy decoding gives for the first prompts of the test split, without the end.

    Args:
        model: the top layers, with whatever adapter.
        bottom: the layers below, see `model.bottom_of`.
        task: whose prompts.
        end: id of the token that ends an answer.
        count: so many prompts.
        new_tokens: at most so many for each.
    """
    data, upper, lower = task.splits["test"], causal(model), bottom.model
    count = min(count, len(data))
    asked = data.asked[:count]
    width, before = int(asked.max()), task.prefix.shape[1]
    embed = lower.embed_tokens
    _, below = after_prefix(lower, embed(task.prefix_ids), embed(task.ids[:count, :width]))
    states, above = after_prefix(upper.model, task.prefix, data.hidden[:count, :width])
    rows = torch.arange(count)
    logits = upper.lm_head(states[rows, asked - 1])
    # what pads a prompt on the right is hidden from what is generated behind it
    seen = torch.cat([torch.ones(count, before), torch.arange(width) < asked[:, None]], 1).long()
    made: list[list[int]] = [[] for _ in range(count)]
    running = torch.ones(count, dtype=torch.bool)
    for step in range(new_tokens):
        token = logits.argmax(1)
        running &= token != end
        for row in running.nonzero()[:, 0].tolist():
            made[row].append(int(token[row]))
        if step == new_tokens - 1 or not running.any():
            break
        seen = torch.cat([seen, torch.ones(count, 1, dtype=seen.dtype)], 1)
        places = (before + asked + step)[:, None]
        hidden = _onward(lower, embed(token[:, None]), seen, places, below)
        logits = upper.lm_head(_onward(upper.model, hidden, seen, places, above)[:, 0])
    return made


def _onward(
    decoder: Any, inputs: torch.Tensor, seen: torch.Tensor, places: torch.Tensor, past: DynamicCache
) -> torch.Tensor:
    out = decoder(inputs_embeds=inputs, attention_mask=seen, position_ids=places, past_key_values=past, use_cache=True)
    return out.last_hidden_state
