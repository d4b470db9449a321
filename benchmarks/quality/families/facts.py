"""What is told by sources alone: their gain over the head, and how much of an adapter a basis of others keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from subspace_peft import SubspaceBasis
from subspace_peft.energy import EnergyRecord, of_source
from subspace_peft.report.advice import classes
from subspace_peft.report.facts import LEFT_OUT
from subspace_peft.report.verdict import verdict_of
from subspace_peft.sources import open_source

from ..encoder import Head
from ..fleet import source
from ..training import Budget, make_model, score, train
from .cells import K, reached
from .runs import Runs

QUICK = Budget(examples=100, steps=60, checks=())  # of a LoRA that a user could train to see how related a fleet is
HEAD_SEED = 100  # that of the sources


def headroom(runs: Runs, member: str, rate: float) -> dict[str, float]:
    """Return the test scores of a source and of the head alone under the source's budget.

    Args:
        runs: of the family.
        member: its name.
        rate: of the head alone.
    """
    name = runs.task(member)
    folder = runs.bench.source(name)
    task = runs.bench.task(name)
    model = PeftModel.from_pretrained(make_model(runs.bench.top(name), task.outputs, 0), str(folder))
    pooled = runs.bench.pooled(name)
    head = Head(pooled.splits["train"].hidden.shape[-1], task.outputs, HEAD_SEED)
    train(head, pooled, runs.source_budget, rate, HEAD_SEED, curve=False)
    return {"source": round(score(model, task, "test"), 5), "head": round(score(head, pooled, "test"), 5)}


def energies(runs: Runs, member: str, seed: int, count: int, mixed: bool) -> dict[str, Any]:
    """Return what the weights of a basis of `count` sources say, and what it keeps of a held-out member's adapters.

    ``own``: of its source as the others were trained; ``quick``: of a LoRA of `QUICK`. ``left_out`` and ``class`` are
    the report's, from the fleet alone.
    """
    basis = runs.basis(member, count, reached(K, count), seed, mixed, leave_one_out=True)
    name = runs.task(member)
    own = runs.bench.source(name)
    quick = source(name, runs.bench.folder, budget=QUICK)
    said = outlook_of(basis)
    return {
        "member": member,
        "seed": seed,
        "sources": count,
        "mixed": mixed,
        "k": reached(K, count),
        "own": round(energy_kept(basis, own), 5),
        "quick": round(energy_kept(basis, quick), 5),
        **said,
    }


def outlook_of(basis: SubspaceBasis) -> dict[str, Any]:
    """Return what the report says of new tasks: its class, the share kept of adapters left out, and its words."""
    record = EnergyRecord.of(basis.info)
    numbers = {"kept": record.kept, "null_kept": record.null, LEFT_OUT: record.left_out, "random": record.random}
    short = lambda value: None if value is None else round(value, 5)  # noqa: E731
    return {
        "class": classes(numbers)[1],
        "left_out": short(record.left_out),
        "random": short(record.random),
        "words": verdict_of(basis)[2],
    }


@torch.no_grad()
def energy_kept(basis: SubspaceBasis, adapter: Path) -> float:
    """Return the share of an adapter's energy that a basis keeps, over all modules."""
    source = open_source(str(adapter))
    shares, norms = {}, {}
    for name in source.keys:
        update, key = source.factors(name), basis.find(name)
        norms[name] = float(update.norm())
        if key is not None and norms[name] > 0:
            module = basis[key]
            kept = (module.U.double().T @ update.B.double()) @ (update.A.double() @ module.V.double().T)
            shares[name] = float(kept.square().sum()) / norms[name] ** 2
    return of_source(shares, norms)
