"""One training run of the top layers: the same loop and budget for every row."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import nn

from ..training import Budget, batches, draw_examples
from .answers import loss, measure
from .encoded import EncodedTask


def train(model: nn.Module, task: EncodedTask, budget: Budget, rate: float, seed: int) -> dict[str, Any]:
    """Train what requires gradients by AdamW on examples that `seed` draws; warm-up 6 % of the steps, linear decay.

    Returns:
        ``validation``, minus the negative log-likelihood per answer token of the validation split, NaN where the run
        diverged; ``curve``, that score at the last step; ``seconds`` of training.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
    warm = max(1, round(0.06 * budget.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm, (budget.steps - step) / max(1, budget.steps - warm))
    )
    data = task.splits["train"]
    chosen, draw = draw_examples(task, budget, seed)
    began = time.perf_counter()
    for which in batches(data, chosen, budget, draw):
        value = loss(model, task.prefix, data.take(which))
        value.backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if not math.isfinite(float(value.detach())):
            break
    seconds = time.perf_counter() - began
    score = -measure(model, task, "validation")["nll"]
    return {"validation": score, "curve": [(budget.steps, score)], "seconds": seconds}
