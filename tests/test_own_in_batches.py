"""Rows of a mixed batch whose tasks have directions of their own equal these tasks alone, live and in a bank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from subspace_peft import SubspaceConfig, TaskBank
from subspace_peft.tasks import read_task

# a task per kind of coefficients, with as many own directions, more, fewer or none
TASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "wide": {"extra_rank": 3},
    "factor": {"coefficients": "factor", "r": 2, "extra_rank": 1},
    "diagonal": {"coefficients": "diagonal", "extra_rank": 2, "extra_rank_pattern": {"lin": 0, "conv": 3}},
    "only": {"extra_rank_pattern": {"embed": 2, "flat": 1}},
}


class Scaled(nn.Embedding):
    """As some decoders have it: what is looked up is multiplied."""

    embed_scale = 3.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.embed_scale


class Every(nn.Module):
    """Every kind of layer that is adapted: embeddings, convolutions, linear layers and a `Conv1D`."""

    def __init__(self, **conv: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = Scaled(50, 36)
        self.conv = nn.Conv2d(4, 8, **{"kernel_size": 3, "stride": 2, "padding": 1, **conv})
        self.point = nn.Conv2d(8, 6, 1)
        self.lin = nn.Linear(6, 5)
        self.flat = Conv1D(4, 5)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids).view(len(ids), 4, 6, 6)
        x = torch.tanh(self.point(torch.tanh(self.conv(x)))).flatten(2).transpose(1, 2)
        return self.head(torch.tanh(self.flat(torch.tanh(self.lin(x)))).amax(1))


TARGETS = ["embed", "conv", "point", "lin", "flat", "head"]
CONVOLUTIONS: list[dict[str, Any]] = [
    {},
    {"kernel_size": 2, "stride": 1, "padding": "same"},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)},
    {"padding_mode": "reflect"},
    {"padding_mode": "circular", "stride": 1, "dilation": 2, "padding": 2},
    {"padding_mode": "replicate", "padding": "same", "stride": 1},
]
NAMES = ["wide", "__base__", "plain", "only", "factor", "wide", "diagonal"]
IDS = torch.randint(0, 50, (len(NAMES), 4), generator=torch.Generator().manual_seed(1))


def outputs(model: nn.Module, ids: torch.Tensor = IDS, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids, **kwargs)


def filled(model: nn.Module) -> nn.Module:
    """Random coefficients and own directions, as if trained, of about the same effect."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "subspace_coef" in name:
            std = 0.5 if "extra" in name else 0.02
            parameter.data.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def adapted(conv: dict[str, Any] | None = None) -> PeftModel:
    """A model with all tasks as adapters, on one basis, and one on another."""
    basis = {"basis": "random", "k": 4, "target_modules": TARGETS, "save_basis": True}
    model = None
    for name, config in TASKS.items():
        made = SubspaceConfig(**basis, **config)
        if model is None:
            model = get_peft_model(Every(**(conv or {})), made, adapter_name=name)
        else:
            model.add_adapter(name, made)
    model.add_adapter("elsewhere", SubspaceConfig(**{**basis, "k": 3, "seed": 5}, extra_rank=1))
    return filled(model)


def alone(model: PeftModel, ids: torch.Tensor, names: list[str]) -> torch.Tensor:
    rows = []
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(outputs(model, ids[i : i + 1]))
        else:
            model.set_adapter(name)
            rows.append(outputs(model, ids[i : i + 1]))
    model.set_adapter("plain")
    return torch.cat(rows)


def banked(model: PeftModel, adapter: str = "plain", **how: Any) -> TaskBank:
    """A bank of the tasks, called by capital letters."""
    bank = TaskBank(model, adapter, **{"extra_rank": 3, **how})
    for name in TASKS:
        bank.add(name.upper(), read_task(model, adapter_name=name))
    return bank


HOLDS = {"live": str, "bank": str.upper, "both": lambda name: name.upper() if name in ("wide", "only") else name}


@pytest.mark.parametrize("holds", HOLDS)
@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_a_row_is_its_task_alone(conv, holds):
    model = adapted(conv)
    expected = alone(model, IDS, NAMES)
    banked(model)
    names = [name if name == "__base__" else HOLDS[holds](name) for name in NAMES]
    torch.testing.assert_close(outputs(model, adapter_names=names), expected, atol=1e-4, rtol=1e-4)
    base = outputs(Every(**conv))
    assert [bool((row - other).abs().max() > 1e-2) for row, other in zip(expected, base, strict=True)] == [
        name != "__base__" for name in NAMES
    ]
