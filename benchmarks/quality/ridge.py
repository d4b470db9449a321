"""Heads by ridge regression: what features are worth, without training."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def targets(labels: torch.Tensor, outputs: int) -> torch.Tensor:
    """Return targets (n, outputs): numbers as they are where `outputs` is 1, classes one-hot."""
    return labels.float()[:, None] if outputs == 1 else F.one_hot(labels, outputs).float()


def ridge(
    features: torch.Tensor, labels: torch.Tensor, outputs: int, strength: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight (outputs, d) and bias (outputs,) of a ridge regression of `targets` on features (n, d).

    The bias is not held down.
    """
    x, y = features.double(), targets(labels, outputs).double()
    middle, level = x.mean(0), y.mean(0)
    gram = (x - middle).T @ (x - middle) + strength * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, (x - middle).T @ (y - level)).T
    return weight.float(), (level - weight @ middle).float()
