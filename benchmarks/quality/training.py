"""One training run: the same loop, budget and head for every row."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import common as shared
import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import nn

from .encoder import Top, half_is_faster
from .tasks import EncodedTask, Split

HEAD = "classifier"
HEAD_RATE = 5e-3  # of the classifier beside an adapter, in all that was measured before heads were tried


@dataclass(frozen=True)
class Budget:
    """The budget of every row.

    Training examples, optimizer steps, examples per step, the steps at which it is validated, the norm to which all
    gradients together are cut (none with 0); how the head starts, one of `heads.STARTS`, and its learning rate beside
    an adapter.
    """

    examples: int = 300
    steps: int = 60
    batch: int = 16
    checks: tuple[int, ...] = (20, 40)
    clip: float = 0.0
    head_start: str = "drawn"
    head_rate: float = HEAD_RATE

    def settings(self) -> dict[str, Any]:
        """Return what of the budget is part of a run's key.

        The head's treatment is left out where it is the first one, so that runs from before it could be chosen are
        found again.
        """
        first = {each.name: each.default for each in fields(self) if each.name.startswith("head_")}
        return {key: value for key, value in asdict(self).items() if key not in first or value != first[key]}


BRIEF = Budget(checks=())  # validated at its end only


def make_model(top: dict[str, Any], outputs: int, seed: int) -> Top:
    """Return the classifier on the top layers, its head drawn by `seed`; frozen layers in bfloat16 where faster."""
    return Top(**top, outputs=outputs, seed=seed, half=half_is_faster())


def pooled(top: dict[str, Any], task: EncodedTask) -> EncodedTask:
    """Return the task with the features that a head on untouched layers sees, one position each."""
    model = make_model(top, 1, 0)
    splits = {}
    for name, split in task.splits.items():
        features = outputs_of(model.features, split)[:, None]
        splits[name] = Split(features, torch.ones(len(split), dtype=torch.int64), split.labels)
    return EncodedTask(task.name, splits, task.outputs, task.digest)


def train(
    model: nn.Module, task: EncodedTask, budget: Budget, rate: float, seed: int, *, curve: bool
) -> dict[str, Any]:
    """Train by AdamW on `budget.examples` of the task's training examples, drawn by `seed`.

    The rate warms up over 6 % of the steps and decays linearly.

    Where there is no adapter `rate` is the head's. Returns ``validation``, ``curve`` (pairs of step and validation
    score, only the last without `curve`) and ``seconds`` of training.
    """
    groups = shared.parameter_groups(model, HEAD, rate, budget.head_rate)
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    warm = max(1, round(0.06 * budget.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm, (budget.steps - step) / max(1, budget.steps - warm))
    )
    data = task.splits["train"]
    chosen, draw = draw_examples(task, budget, seed)
    loss_of = make_loss(task, data.labels[chosen])
    points, seconds = [], 0.0
    began = time.perf_counter()
    for step, which in enumerate(batches(data, chosen, budget, draw), 1):
        some = data.take(which)
        loss = loss_of(model(some.hidden, some.lengths), some.labels)
        loss.backward()
        if budget.clip:
            nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], budget.clip)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if not math.isfinite(float(loss.detach())):
            break
        if curve and step in budget.checks:
            seconds += time.perf_counter() - began
            points.append((step, score(model, task, "validation")))
            began = time.perf_counter()
    seconds += time.perf_counter() - began
    points.append((step, score(model, task, "validation")))
    return {"validation": points[-1][1], "curve": points, "seconds": seconds}


def make_loss(task: EncodedTask, known: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return a function (outputs, labels) → loss: the cross-entropy, or the squared error.

    The latter is of labels that are standardised as the `known` ones (n,) are.
    """
    if not task.number:
        return F.cross_entropy
    centre, spread = known.mean(), known.std()
    return lambda outputs, labels: F.mse_loss(outputs[:, 0], (labels - centre) / spread)


def draw_examples(task: EncodedTask, budget: Budget, seed: int) -> tuple[list[int], random.Random]:
    """Return the places of the training examples that `seed` draws, and what draws their order."""
    count = len(task.splits["train"])
    draw = random.Random(f"{seed}/{task.name}")
    return draw.sample(range(count), min(budget.examples, count)), draw


def batches(data: Split, chosen: Sequence[int], budget: Budget, draw: random.Random) -> Iterator[torch.Tensor]:
    """Yield the places of `budget.steps` batches.

    Within windows of four batches the examples are sorted by length, for little padding.
    """
    done, queue = 0, []
    while done < budget.steps:
        if not queue:
            order = list(chosen)
            draw.shuffle(order)
            window = 4 * budget.batch
            for start in range(0, len(order), window):
                part = sorted(order[start : start + window], key=lambda i: int(data.lengths[i]))
                queue += [part[i : i + budget.batch] for i in range(0, len(part), budget.batch)]
            queue = [part for part in queue if len(part) == budget.batch] or queue
            draw.shuffle(queue)
        yield torch.tensor(queue.pop())
        done += 1


@torch.no_grad()
def outputs_of(
    model: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], split: Split, batch: int = 64
) -> torch.Tensor:
    """Return the model's outputs (n, outputs) in the split's order."""
    order = split.lengths.argsort(stable=True)
    found = None
    for which in order.split(batch):
        some = split.take(which)
        out = model(some.hidden, some.lengths)
        found = out.new_empty(len(split), out.shape[1]) if found is None else found
        found[which] = out
    assert found is not None
    return found


def score(model: nn.Module, task: EncodedTask, name: str) -> float:
    """Return the accuracy, or Spearman's correlation where a number is predicted, on the split `name`.

    It is NaN where outputs are not finite.
    """
    split = task.splits[name]
    return measure(outputs_of(model, split), split.labels)


def measure(outputs: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the accuracy of (n, classes), or Spearman's correlation of (n, 1) with real `labels`."""
    if not torch.isfinite(outputs).all():
        return float("nan")
    if outputs.shape[1] > 1:
        return float((outputs.argmax(1) == labels).double().mean())
    ranks = [rankdata(column.double().numpy()) for column in (outputs[:, 0], labels)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])
