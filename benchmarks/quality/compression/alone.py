"""Adapters stored one by one: as they were trained, or their best approximation of lower rank, in fewer bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .members import Fleet
from .storing import Stored, Tensors, Updates, restore, store


def as_trained(fleet: Fleet, kind: str) -> Stored:
    """Store the factors as they were trained.

    A direction, a row of A or a column of B, is one row with one scale. Where all adapters have the same A, it is
    stored once.
    """
    shared: Tensors = {}
    tasks: dict[str, Tensors] = {name: {} for name in fleet.names}
    for name in fleet.names:
        for module, update in fleet.factors(name).items():
            tasks[name] |= store(f"{module}.B", update.B.T, kind)
            inputs = shared if fleet.frozen_inputs else tasks[name]
            inputs |= store(f"{module}.A", update.A, kind)
    return Stored(shared, tasks, product)


def truncated(fleet: Fleet, rank: int, kind: str) -> Stored:
    """Store the leading `rank` singular triples of every update, each singular value's root on both sides."""
    tasks: dict[str, Tensors] = {name: {} for name in fleet.names}
    for name in fleet.names:
        for module, update in fleet.factors(name).items():
            P, S, T = update.canonical()
            root = S[:rank].sqrt()
            tasks[name] |= store(f"{module}.B", (P[:, :rank] * root).T, kind)
            tasks[name] |= store(f"{module}.A", (T[:, :rank] * root).T, kind)
    return Stored({}, tasks, product)


def product(shared: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> Updates:
    """Return B A of every module, both stored as rows (r, …)."""
    both = {**shared, **own}
    modules = [key.removesuffix(".B") for key in own if key.endswith(".B")]
    return {module: restore(both, f"{module}.B").T @ restore(both, f"{module}.A") for module in modules}
