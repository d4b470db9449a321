"""Share's rule (arXiv 2602.06043), by its formulas: two bases per module, re-fitted to all tasks' factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

SCALE = 2.0  # alpha / r of the given adapters

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class SharedFactors:
    """The two bases of one module and every task's loadings in them.

    Attributes:
        out: β (out, K) float64, orthonormal columns.
        inner: α (in, K) float64, orthonormal columns.
        loadings: task → its ε of both sides, (K, r) each: ``B = β ε_B``, ``Aᵀ = α ε_A``.
    """

    out: torch.Tensor
    inner: torch.Tensor
    loadings: dict[str, Pair]

    def factors(self, name: str) -> Pair:
        """Return a task's reconstructed factors B (out, r) and Aᵀ (in, r)."""
        left, right = self.loadings[name]
        return self.out @ left, self.inner @ right


def leading(stack: torch.Tensor, k: int) -> torch.Tensor:
    """Return the k leading eigenvectors (d, k) of a stack's (d, n) second moment, centred over its columns."""
    centred = stack - stack.mean(1, keepdim=True)
    vectors = torch.linalg.eigh(centred @ centred.T)[1]
    return vectors.flip(1)[:, :k].contiguous()


def first_bases(given: dict[str, Pair], k: int) -> SharedFactors:
    """Return the bases of the given tasks' factors B (out, r) and Aᵀ (in, r), and their loadings by projection."""
    out, inner = (leading(torch.cat([pair[side] for pair in given.values()], 1), k) for side in (0, 1))
    return SharedFactors(out, inner, {name: (out.T @ B, inner.T @ A) for name, (B, A) in given.items()})


def absorbed(before: SharedFactors, name: str, loadings: Pair, update: Pair, *, keep: bool) -> SharedFactors:
    """Return the bases re-fitted, at their fixed size, to all tasks' reconstructed factors and the new one's update.

    Args:
        before: the bases and all earlier tasks.
        name: the new task.
        loadings: what it learned in the bases, (K, r) per side.
        update: the temporary update of each factor, (out, r) and (in, r).
        keep: whether the new task's loadings are those of reconstruction and update together. The released code
            projects the reconstruction alone: what the update had learned is dropped.

    Returns:
        All tasks, projected on the new bases.
    """
    known = {each: before.factors(each) for each in before.loadings}
    known[name] = (before.out @ loadings[0], before.inner @ loadings[1])
    bases = [
        leading(torch.cat([*(pair[side] for pair in known.values()), update[side]], 1), basis.shape[1])
        for side, basis in enumerate((before.out, before.inner))
    ]
    if keep:
        known[name] = (known[name][0] + update[0], known[name][1] + update[1])
    return SharedFactors(*bases, {each: (bases[0].T @ B, bases[1].T @ A) for each, (B, A) in known.items()})


def distance(one: Pair, other: Pair) -> tuple[float, float]:
    """Return ``‖B Aᵀᵀ − B' A'ᵀᵀ‖_F`` and ``‖B Aᵀᵀ‖_F`` of two pairs of factors, without forming a product."""
    left, right = torch.cat([one[0], -other[0]], 1), torch.cat([one[1], other[1]], 1)
    lost = torch.linalg.qr(left, mode="r")[1] @ torch.linalg.qr(right, mode="r")[1].T
    whole = torch.linalg.qr(one[0], mode="r")[1] @ torch.linalg.qr(one[1], mode="r")[1].T
    return float(lost.norm()), float(whole.norm())


class Learning(nn.Module):
    """A linear layer while Share learns a task: loadings in the bases, and a temporary update of rank φ per factor.

    It begins at no effect: B is zero in both its parts, A random in its loadings, of the norm that PEFT's LoRA begins
    with.
    """

    def __init__(self, layer: nn.Linear, shared: SharedFactors, rank: int, extra: int, draw: torch.Generator) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("out", shared.out.float())
        self.register_buffer("inner", shared.inner.float())
        k = shared.out.shape[1]
        self.left = nn.Parameter(torch.zeros(k, rank))
        self.right = nn.Parameter(torch.randn(k, rank, generator=draw) / (3 * k) ** 0.5)
        for side, basis in (("left", self.out), ("right", self.inner)):
            columns = torch.linalg.qr(torch.randn(len(basis), extra, generator=draw))[0]
            setattr(self, f"{side}_columns", nn.Parameter(columns))
            setattr(self, f"{side}_rows", nn.Parameter(torch.zeros(extra, rank)))

    def update(self) -> Pair:
        """Return the temporary update of B (out, r) and of Aᵀ (in, r)."""
        return self.left_columns @ self.left_rows, self.right_columns @ self.right_rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.update()
        B, A = self.out @ self.left + left, self.inner @ self.right + right
        return self.layer(x) + SCALE * (x @ A) @ B.T


class Learned(nn.Module):
    """A linear layer with a task's factors B (out, r) and Aᵀ (in, r)."""

    def __init__(self, layer: nn.Linear, factors: Pair) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("B", factors[0].float())
        self.register_buffer("A", factors[1].float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + SCALE * (x @ self.A) @ self.B.T


def replace_layers(model: nn.Module, made: dict[str, nn.Module]) -> nn.Module:
    """Put a module in the place of each named layer; return the model."""
    for name, module in made.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, module)
    return model


def adapted_layers(model: nn.Module, endings: Sequence[str]) -> dict[str, nn.Linear]:
    """Return the linear layers whose name ends in one of `endings`."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in endings
    }
