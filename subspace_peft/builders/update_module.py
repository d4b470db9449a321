"""Update one module of a basis, by new adapters' updates and the cores that the old basis holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..basis import ModuleBasis
from ..basis.transfer import Own, Transfer
from ..energy import mean, share_of
from ..errors import SubspaceError
from .absorb import absorb
from .extend import exact_beside, frame, grow, refit
from .hosvd import Compressed, Pair
from .memory import MemoryPlan
from .reader import Reader
from .streaming import compress


@dataclass(frozen=True, eq=False)
class OldModule:
    """A module of the old basis.

    Attributes:
        name: in the basis.
        module: its tensors.
        source_weights: how much each of its sources counts.
        tasks: cores (k_out, k_in) of tasks that have to be kept as well, in units of ΔW.
        task_weights: how much each of these counts; None for alike.
        fit_sources: whether a refit is to its sources' stored cores too.
        own: the own directions of tasks that it absorbs, ``(B, A)`` each.
    """

    name: str
    module: ModuleBasis
    source_weights: list[float]
    tasks: list[torch.Tensor]
    task_weights: list[float] | None = None
    fit_sources: bool = True
    own: Sequence[Own] = ()


def update_module(
    plan: MemoryPlan,
    reader: Reader,
    name: str,
    old: OldModule,
    add: int | float,
    add_in: int | None,
    bound: tuple[int, int] | None,
    k: tuple[int, int] | None,
    alternations: int,
) -> tuple[ModuleBasis, dict[str, Any]]:
    """Grow a module of a basis, or fit it again.

    Args:
        plan: of the new adapters' modules.
        reader: of their files.
        name: the module's name in the new fleet.
        old: the module as it is.
        add: directions to add per side, or the share of the new adapters' energy to keep.
        add_in: directions to add on the input side where they differ.
        bound: the most that tasks' own directions may add per side; None for what they need.
        k: instead, directions per side to fit for old and new alike.
        alternations: at most this many rounds.

    Returns:
        The new module, and the facts about it: ``added`` directions per side, ``needed`` by the tasks' own directions
        where there are such, ``kept_before`` and ``kept`` of the new
        adapters' energy (means over them), ``numerics``, ``drift`` (the most that a core loses of its norm),
        ``shares`` kept of every new source, and ``squares``, the old sources' squared norms before and after.
    """
    task, start = plan.module(name), old.module
    needed: tuple[int, int] | None = None
    if k is None and old.own:
        absorbed = absorb(start, old.own, bound)
        start, needed = absorbed.module, absorbed.needed
    fixed = frame(start)
    pair: Pair | None = None
    width = task.width
    while pair is None:
        if task.exact:
            compressed = exact_beside(task.updates(reader), task.weights, fixed)
        else:
            stack = task.stack(reader, keep=plan.keep)
            compressed = compress(stack, width, leading=task.leading, bound=False, fixed=fixed)
        if k is None:
            pair = grow(compressed, start, add, add_in, alternations)
        else:
            pair = refit(with_old(compressed, old), k, alternations)
        # a share of energy takes as many directions as it takes
        width *= 2
    a, b = old.module.k_out, old.module.k_in
    before = [0.0] * len(task.members)
    found = torch.zeros(len(plan.fleet.sources), pair.U.shape[1], pair.V.shape[0], dtype=torch.float64)
    shares: list[float | None] = [None] * len(plan.fleet.sources)
    for places, cores in compressed.cores(compressed.scales, pair.u, pair.v):
        for place, core in zip(places, cores, strict=True):
            i, square = task.members[place], float(core.square().sum())
            found[i], shares[i] = core, share_of(square, task.norms[place] ** 2)
    for places, cores in compressed.cores(
        compressed.scales,
        torch.eye(compressed.out.Q.shape[1], a, dtype=torch.float64),
        torch.eye(compressed.inner.Q.shape[1], b, dtype=torch.float64),
    ):
        for place, square in zip(places, cores.square().sum((1, 2)).tolist(), strict=True):
            before[place] = share_of(square, task.norms[place] ** 2)
    source_weights = torch.zeros(len(plan.fleet.sources), dtype=torch.float64)
    source_weights[task.members] = torch.tensor(task.source_weights, dtype=torch.float64)
    module, drift = joined_module(old, pair, found, source_weights)
    squares = [
        (float(was.double().square().sum()), float(now.double().square().sum()))
        for was, now in _stored(old.module, module)
    ]
    return module, {
        "added": [pair.U.shape[1] - a, pair.V.shape[0] - b],
        **({} if needed is None else {"needed": list(needed)}),
        "kept_before": mean(before),
        "kept": mean(shares),
        "numerics": "streamed" if compressed.passes else "exact",
        "drift": drift,
        "shares": shares,
        "squares": squares,
    }


def with_old(compressed: Compressed, old: OldModule) -> Compressed:
    """Return the new updates together with the cores that the old basis holds, its sources' and its tasks'.

    Each counts as of norm 1. A core C is the update U C V of the old basis, whose directions come first in Q: there it
    is C, padded with zeros.
    """
    cores = [core.double() for core in old.tasks]
    counts = old.task_weights or [1.0] * len(cores)
    weights = [count**0.5 / max(float(core.norm()), 1e-300) for core, count in zip(cores, counts, strict=True)]
    if old.module.cores is not None and old.fit_sources:
        for core, count in zip(old.module.cores.double(), old.source_weights, strict=True):
            if (size := float(core.norm())) > 0:
                cores.append(core)
                weights.append(count**0.5 / size)
    if not cores:
        raise SubspaceError(
            f"Module {old.name!r}: with k= the directions are fitted again, and what the old basis's tasks need is not"
            " known: it does not keep its sources' cores. Pass the tasks' cores with cores= (--tasks), or grow with"
            " add=, which loses nothing."
        )
    parts, places = list(compressed.parts), len(compressed.scales)
    room = [side.Q.shape[1] for side in (compressed.out, compressed.inner)]
    left = torch.zeros(len(cores), room[0], old.module.k_in, dtype=torch.float64)
    left[:, : old.module.k_out] = torch.stack(cores)
    right = torch.eye(old.module.k_in, room[1], dtype=torch.float64).expand(len(cores), -1, -1)
    parts.append((list(range(places, places + len(cores))), left, right))
    total = compressed.total + sum(w * w * float(core.square().sum()) for w, core in zip(weights, cores, strict=True))
    return replace(
        compressed,
        parts=parts,
        total=total,
        scales=[*compressed.scales, *[1.0] * len(cores)],
        weights=[*compressed.weights, *weights],
    )


def _stored(old: ModuleBasis, new: ModuleBasis) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the old sources' cores, before and after."""
    return [] if old.cores is None or new.cores is None else list(zip(old.cores, new.cores, strict=False))


def joined_module(
    old: OldModule, pair: Pair, found: torch.Tensor, source_weights: torch.Tensor, *, measure: bool = True
) -> tuple[ModuleBasis, float]:
    """Carry the old module's statistics over to the new bases, and join the new sources'.

    Args:
        old: the module as it was.
        pair: the new bases.
        found: the new sources' cores (n, k_out, k_in) float64.
        source_weights: how much each of them counts (n,) float64.
        measure: whether the drift is asked for, which takes longer than the rest.

    Returns:
        The new module, and the most that a stored source's or a task's core loses of its norm; 0 if not measured.
    """
    module = old.module
    dtype = module.U.dtype
    bare = ModuleBasis(U=pair.U.to(dtype).contiguous(), V=pair.V.to(dtype).contiguous())
    move = Transfer(module, bare, old.name)
    stored = None if module.cores is None else move.core(module.cores)
    rms = None
    if module.core_rms is not None and (move.leading or stored is not None):
        # the mean square over old and new sources: of old ones from their cores, or else from their mean square
        weight = torch.tensor(old.source_weights, dtype=torch.float64)
        if stored is not None:
            alive = module.cores.flatten(1).any(1) if module.cores is not None else torch.ones(0)
            weight = weight * alive
            square = torch.einsum("n,noi->oi", weight, stored.square())
        else:
            square = move.core(module.core_rms.double().square()) * weight.sum()
        square = square + torch.einsum("n,noi->oi", source_weights, found.square())
        rms = (square / (weight.sum() + source_weights.sum())).sqrt()
    G = None if module.G is None else move.core(module.G)
    if G is not None and not move.leading:
        # direction tensors are of norm 1; one that lies outside the new bases has no direction left
        norms = G.flatten(1).norm(dim=1)[:, None, None]
        G = torch.where(norms > 1e-6, G / norms.clamp_min(1e-6), torch.zeros_like(G))
    parts = {
        "M": None if module.M is None else move.core(module.M),
        "G": G,
        "core_rms": rms,
        "cores": None if stored is None else torch.cat([stored, found]),
    }
    kept = [] if module.cores is None else [core for core in module.cores.double() if core.any()]
    cores = [*kept, *old.tasks] if measure else []
    drift = max((move.drift(core, move.core(core)) for core in cores), default=0.0)
    tensors = {key: None if value is None else value.to(dtype).contiguous() for key, value in parts.items()}
    new = replace(bare, **tensors, spectrum_out=module.spectrum_out, spectrum_in=module.spectrum_in)
    return new, drift
