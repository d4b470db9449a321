"""Tasks and top layers of a few numbers, in the place of real ones. No downloads."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quality import bench as bench_module
from benchmarks.quality import fleet as fleet_module
from benchmarks.quality.bench import Bench
from benchmarks.quality.encoder import Block
from benchmarks.quality.tasks import EncodedTask, Split
from benchmarks.quality.training import Budget

D, INNER = 16, 32
SMALL = Budget(examples=24, steps=4, batch=8, checks=(2,))


def blocks(count: int = 2) -> list[dict[str, torch.Tensor]]:
    # aside, or every source would start where this seed leaves off
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [{k: v.detach() for k, v in Block(D, INNER, 2, 1e-5, False).state_dict().items()} for _ in range(count)]


def top_of() -> dict:
    return {"blocks": blocks(), "heads": 2, "eps": 1e-5, "before": False, "final": None}


def toy(name: str, outputs: int = 2) -> EncodedTask:
    generator = torch.Generator().manual_seed(len(name))
    splits = {}
    for split, n in (("train", 32), ("validation", 20), ("test", 30)):
        hidden, lengths = torch.randn(n, 6, D, generator=generator), torch.randint(2, 7, (n,), generator=generator)
        value = hidden[:, 0, 0]
        splits[split] = Split(hidden, lengths, value if outputs == 1 else (value > 0).long())
    return EncodedTask(name, splits, outputs, name)


NAMES = ("one", "three", "seventh")


@pytest.fixture
def toys(monkeypatch):
    for module in (bench_module.tasks, fleet_module):
        monkeypatch.setattr(module, "load", lambda name, folder: toy(name))
        monkeypatch.setattr(module, "top_layers", lambda kind, folder: top_of())
    monkeypatch.setattr(bench_module.tasks, "kind_of", lambda name: "text")
    monkeypatch.setattr(bench_module.tasks, "names", lambda kind: NAMES)


@pytest.fixture
def bench(tmp_path, toys):
    return Bench(tmp_path, source_budget=SMALL, seeds=(1, 2))


def orthonormal(columns: torch.Tensor) -> bool:
    return torch.allclose(columns.T @ columns, torch.eye(columns.shape[1]), atol=1e-5)
