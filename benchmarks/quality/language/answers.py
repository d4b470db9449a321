"""How well a model answers: the likelihood of the right answers, and what greedy decoding would say."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .encoded import EncodedTask, Sequences
from .model import after_prefix


def causal(model: nn.Module) -> Any:
    """Return the causal language model inside a PEFT model, its layers those that PEFT put in; else the model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def answer_logits(model: nn.Module, prefix: torch.Tensor, some: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (m, vocabulary) at the m positions of `some` that an answer's token follows, and these (m,).

    Nowhere else are logits computed: they are as wide as the vocabulary.
    """
    inner = causal(model)
    hidden, _ = after_prefix(inner.model, prefix, some.hidden)
    follows = some.targets != -100
    return inner.lm_head(hidden[follows]), some.targets[follows]


def loss(model: nn.Module, prefix: torch.Tensor, some: Sequences) -> torch.Tensor:
    """Return the mean negative log-likelihood of the answers' tokens."""
    return F.cross_entropy(*answer_logits(model, prefix, some))


@torch.no_grad()
def measure(model: nn.Module, task: EncodedTask, split: str, batch: int = 32) -> dict[str, float]:
    """Return how well the model answers the prompts of a split, the right answer's earlier tokens given.

    Returns:
        ``nll``: mean negative log-likelihood per answer token, its end included, in nats. ``exact_match``: share of
        answers of which every token is the likeliest; greedy decoding gives such an answer, and no other right one.
        ``choice``, on tasks with label words alone: share of prompts for which the right word's first token is
        likelier than the other words' first tokens, each of which begins one word only. ``choice_nll``, there too:
        mean negative log-likelihood of the right word among these alone, which tells apart how well a task is known
        from how well its answers' form is.
    """
    data = task.splits[split]
    total, count, exact, chosen, among = 0.0, 0, 0, 0, 0.0
    words = torch.tensor(task.words)
    for which in data.lengths.argsort(stable=True).split(batch):
        some = data.take(which)
        logits, targets = answer_logits(model, task.prefix, some)
        total += float(F.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
        sizes = (some.targets != -100).sum(1).tolist()
        hits = (logits.argmax(1) == targets).split(sizes)
        exact += sum(bool(hit.all()) for hit in hits)
        if len(words):
            first = torch.tensor([0, *sizes[:-1]]).cumsum(0)
            some_logits, right = logits[first][:, words], (targets[first][:, None] == words).int().argmax(1)
            chosen += int((some_logits.argmax(1) == right).sum())
            among += float(F.cross_entropy(some_logits, right, reduction="sum"))
    found = {"nll": total / count, "exact_match": exact / len(data)}
    if len(words):
        found |= {"choice": chosen / len(data), "choice_nll": among / len(data)}
    return found if math.isfinite(total) else dict.fromkeys(found, math.nan)
