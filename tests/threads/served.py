"""A model with a bank of tasks for each kind of layer, and threads that call it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from subspace_peft import SubspaceConfig, TaskBank

from ..models import randomise

WORKERS, TURNS = 4, 6


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.second, self.out = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.second(self.embed(x)).tanh())


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x).tanh())


class Plain(nn.Module):
    def __init__(self, layer: Callable[..., nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.one, self.two, self.three = layer(8, 8), layer(8, 8), layer(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(self.two(self.one(x).tanh()).tanh())


def quantised(layer: str, **given: Any) -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = Plain(lambda rows, columns: getattr(bitsandbytes.nn, layer)(rows, columns, **given))
    return model.to("cpu")  # which quantises


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str], Callable[[], torch.Tensor]]] = {
    "linear": (Plain, ["one", "two", "three"], lambda: torch.randn(2, 3, 8)),
    "conv1d": (lambda: Plain(lambda n, m: Conv1D(m, n)), ["one", "two", "three"], lambda: torch.randn(2, 3, 8)),
    "conv2d": (Convolved, ["one", "two"], lambda: torch.randn(2, 2, 5, 5)),
    "embedding": (Embedded, ["embed", "second", "out"], lambda: torch.randint(0, 20, (2, 5))),
    "8 bits": (
        partial(quantised, "Linear8bitLt", has_fp16_weights=False),
        ["one", "two", "three"],
        lambda: torch.randn(2, 3, 8),
    ),
    "4 bits": (partial(quantised, "Linear4bit"), ["one", "two", "three"], lambda: torch.randn(2, 3, 8)),
}
"""Kind → a model, the modules that are adapted, an input of two rows."""


class Served:
    """A model with a bank of tasks, and what each task answers when it is alone."""

    def __init__(self, make: Callable[[], nn.Module], targets: list[str], given: Callable[[], torch.Tensor]) -> None:
        torch.manual_seed(0)
        config = SubspaceConfig(basis="random", k=3, target_modules=targets, alpha=8.0, extra_rank=1)
        self.model = randomise(get_peft_model(make(), config), std=1.0).eval()
        for name, parameter in self.model.named_parameters():
            if "extra" in name:
                parameter.data *= 20  # their scale is small at a small alpha
        self.x = given()
        self.bank = TaskBank(self.model, capacity=2, extra_rank=2)
        for name in range(WORKERS + 1):
            self.bank.add(f"t{name}", self.cores(name), own=self.own(name))
        with torch.no_grad():
            self.alone = {name: self.model(self.x, adapter_names=names) for name, names in self.rows().items()}

    def cores(self, seed: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(seed)
        return {name: torch.randn(layer.r["default"], generator=draw) for name, layer in self.bank.layers.items()}

    def own(self, seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Two own directions, one or none."""
        rank, draw = (2, 1, 0)[seed % 3], torch.Generator().manual_seed(seed)
        sizes = {name: (layer.out_features, layer.in_features) for name, layer in self.bank.layers.items()}
        return {
            name: (torch.randn(out, rank, generator=draw), torch.randn(rank, size, generator=draw))
            for name, (out, size) in sizes.items()
        }

    def rows(self) -> dict[int, list[str]]:
        """A mixed batch for each worker: tasks of the bank, the model's adapter, the base model."""
        return {i: [f"t{i}", ["default", "__base__", f"t{i + 1}"][i % 3]] for i in range(WORKERS)}

    def wrong(self, worker: int, answer: torch.Tensor) -> bool:
        return not torch.allclose(answer, self.alone[worker], atol=1e-4, rtol=1e-4)


def by_block(served: Served, worker: int) -> torch.Tensor:
    with torch.no_grad(), served.bank.tasks(served.rows()[worker]):
        return served.model(served.x)


def by_argument(served: Served, worker: int) -> torch.Tensor:
    with torch.no_grad():
        return served.model(served.x, adapter_names=served.rows()[worker])


def threads(work: Callable[[int], Any]) -> list[list[Any]]:
    found: list[list[Any]] = [[] for _ in range(WORKERS)]
    started = [
        threading.Thread(target=lambda i=i: found[i].extend(attempt(work, i) for _ in range(TURNS)))
        for i in range(WORKERS)
    ]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    return found


def attempt(work: Callable[[int], Any], worker: int) -> Any:
    try:
        return work(worker)
    except Exception as error:
        return error


def by_names(served: Served, names: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return served.model(served.x, adapter_names=names)


def block(served: Served, names: list[str]) -> torch.Tensor:
    with torch.no_grad(), served.bank.tasks(names):
        return served.model(served.x)
