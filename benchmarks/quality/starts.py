"""Which source's core to start from: the one whose features a linear head does best on, on a few training examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft import get_peft_model
from torch import nn

from subspace_peft import SubspaceBasis, SubspaceConfig

from .fleet import TARGETS
from .tasks import Split
from .training import make_model, outputs_of

if TYPE_CHECKING:
    from .bench import Bench

FIT, HELD = 200, 100


def nearest_source(bench: Bench, name: str, basis: SubspaceBasis) -> str:
    """The name of the source whose projection on `basis` gives features that a ridge regression, fitted on 200 training examples,
    predicts 100 others from best."""
    task = bench.task(name)
    some = task.splits["train"].take(torch.arange(FIT + HELD))
    losses = {}
    for each in basis.info["sources"]:
        model = get_peft_model(
            make_model(bench.top(name), 1, 0),
            SubspaceConfig(basis=basis, start=each["name"], target_modules=TARGETS, save_basis=True),
        )
        model.base_model.model.classifier = nn.Identity()
        losses[each["name"]] = ridge_loss(outputs_of(model, some), some, task.outputs)
    return min(sorted(losses), key=losses.__getitem__)


def ridge_loss(features: torch.Tensor, some: Split, outputs: int, ridge: float = 1.0) -> float:
    """Mean squared error on the last `HELD` examples of a ridge regression on the others, targets centred."""
    y = some.labels.double()[:, None] if outputs == 1 else nn.functional.one_hot(some.labels, outputs).double()
    x, y = features.double(), y - y[:FIT].mean(0)
    x = x - x[:FIT].mean(0)
    gram = x[:FIT].T @ x[:FIT] + ridge * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, x[:FIT].T @ y[:FIT])
    return float((x[FIT:] @ weight - y[FIT:]).square().mean())
