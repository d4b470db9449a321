"""How the head of a run starts: drawn, fitted, or trained before the adapter is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from .encoder import Head
from .ridge import targets
from .tasks import EncodedTask
from .training import Budget, draw_examples, train

STARTS = ("drawn", "fitted", "trained")
FIRST_RATE = 1.6e-2  # at which a head is trained before the adapter: the median of the best ones of the head alone
STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)
SCALES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)

State = Mapping[str, torch.Tensor]


def head_state(pooled: Callable[[], EncodedTask], budget: Budget, seed: int) -> State | None:
    """Return weight (outputs, d) and bias (outputs,) that the head starts at; None for those that its seed draws.

    Args:
        pooled: returns the task with the features of untouched layers.
        budget: of the run; its training examples alone are looked at.
        seed: of the run.

    Raises:
        ValueError: `budget.head_start` is none of `STARTS`.
    """
    if budget.head_start not in STARTS:
        raise ValueError(f"head_start={budget.head_start!r}: give one of {', '.join(STARTS)}.")
    if budget.head_start == "drawn":
        return None
    task = pooled()
    if budget.head_start == "fitted":
        some = task.splits["train"].take(torch.tensor(draw_examples(task, budget, seed)[0]))
        return fitted(some.hidden[:, 0], some.labels, task.outputs)
    head = Head(task.splits["train"].hidden.shape[-1], task.outputs, seed)
    train(head, task, replace(budget, checks=()), FIRST_RATE, seed, curve=False)
    return {key: value.detach() for key, value in head.classifier.state_dict().items()}


def begin(model: Any, start: State | None) -> Any:
    """Return `model`, its `classifier` set to `start` where there is one."""
    if start is not None:
        model.classifier.load_state_dict(start)
    return model


def fitted(features: torch.Tensor, labels: torch.Tensor, outputs: int) -> dict[str, torch.Tensor]:
    """Return weight (outputs, d) and bias (outputs,) of a ridge regression whose outputs suit the loss.

    Numbers are standardised, as the loss has them. Classes are regressed as 0 and 1, and the outputs multiplied by a
    scale that makes logits of them. Ridge strength and scale are those with the least loss on examples left out one at
    a time, which a ridge regression gives in closed form: on the examples that it was fitted on it is too sure.

    Args:
        features: (n, d).
        labels: (n,) classes, or real numbers where `outputs` is 1.
        outputs: classes, or 1.
    """
    y = targets(labels, outputs).double()
    if outputs == 1:
        y = (y - y.mean()) / y.std()
    x = features.double()
    middle, level = x.mean(0), y.mean(0)
    spread = (x - middle).square().mean().sqrt()
    x = (x - middle) / spread
    values, axes = torch.linalg.eigh(x @ x.T)
    inner = axes.T @ (y - level)
    best: tuple[float, float, torch.Tensor] | None = None
    for strength in STRENGTHS:
        shrunk = values.clamp_min(0) / (values.clamp_min(0) + strength)
        out = axes @ (shrunk[:, None] * inner) + level
        own = (axes.square() @ shrunk + 1 / len(y))[:, None]
        left_out = (out - own * y) / (1 - own).clamp_min(1e-6)
        for scale in (1.0,) if outputs == 1 else SCALES:
            loss = (left_out - y).square().mean() if outputs == 1 else F.cross_entropy(scale * left_out, labels)
            if best is None or float(loss) < best[0]:
                dual = axes @ (inner / (values.clamp_min(0) + strength)[:, None])
                best = (float(loss), scale, x.T @ dual)
    assert best is not None
    _, scale, weight = best
    weight = scale * weight.T / spread
    return {"weight": weight.float(), "bias": (scale * level - weight @ middle).float()}
