"""What a build would do, before it does it: every source is read and checked, one module is timed, nothing is built."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from .fleet import Fleet, gather
from .hosvd import hosvd

TIMED_SOURCES = 16


@dataclass(frozen=True)
class BuildPlan:
    """What `plan_build` found.

    Attributes:
        base_model: of the sources, or None.
        sources: per usable source its name, location, revision, base_model, ranks, modules, norm (of ΔW, Frobenius), bytes, seed_group.
        skipped: the others, each with its reason; without ``skip_bad`` they are what the build would raise.
        modules: per module its ``out``, ``in``, how many ``sources`` adapt it, the sum of their ``ranks``, ``k_out`` and ``k_in``.
        bytes_to_read: of the sources' files; a build reads them about three times.
        bytes_of_basis: of U, V and the cores in the basis's file.
        memory: estimated peak in bytes, beside Python and its libraries.
        seconds: estimated time of building, reading aside, on this machine.
    """

    base_model: str | None
    sources: list[dict[str, Any]]
    skipped: list[dict[str, str]]
    modules: dict[str, dict[str, int]]
    bytes_to_read: int
    bytes_of_basis: int
    memory: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan_build(
    sources: Iterable[Any],
    *,
    k: int | float = 32,
    k_in: int | None = None,
    alternations: int = 10,
    partial: bool = False,
    allow_bin: bool = False,
    base_model: nn.Module | None = None,
    token: str | bool | None = None,
    progress: bool = True,
) -> BuildPlan:
    """Read and check a fleet as `build_basis` would, and say what building its basis takes. Arguments as there.

    What comes from the Hub is fetched. Where `k` is a share of energy, sizes are those of the largest basis it could ask for.

    Raises:
        SourceError: no source is usable.
    """
    fleet = gather(
        sources, skip_bad=True, partial=partial, token=token, progress=progress, allow_bin=allow_bin, base_model=base_model
    )  # fmt: skip
    modules, largest = {}, 0
    for name in fleet.modules:
        members = [source for source in fleet.sources if name in source.keys and source.norms[name] > 0]
        if not members:
            continue
        out, inner = members[0].shapes[name]
        ranks = sum(source.ranks[name] for source in members)
        a, b = (min(ranks if isinstance(k, float) else size, ranks, d) for size, d in ((k, out), (k_in or k, inner)))
        modules[name] = {"out": out, "in": inner, "sources": len(members), "ranks": ranks, "k_out": a, "k_in": b}
        largest = max(largest, ranks * (out + inner))
    numbers = sum(m["k_out"] * m["out"] + m["k_in"] * m["in"] for m in modules.values())
    numbers += len(fleet.sources) * sum(m["k_out"] * m["k_in"] for m in modules.values())
    entries = [
        {
            "name": source.name, "location": source.location, "revision": source.revision, "sha256": source.sha256,
            "base_model": source.base_model, "ranks": sorted(set(source.ranks.values())), "modules": len(source.keys),
            "norm": sum(norm**2 for norm in source.norms.values()) ** 0.5,
            "bytes": source.file.stat().st_size if source.file else 0, "seed_group": group,
        }
        for source, group in zip(fleet.sources, fleet.groups, strict=True)
    ]  # fmt: skip
    return BuildPlan(
        base_model=fleet.base_model,
        sources=entries,
        skipped=fleet.skipped,
        modules=modules,
        bytes_to_read=sum(entry["bytes"] for entry in entries),
        bytes_of_basis=4 * numbers,
        # float64: factors, canonical forms, stacks, and what QR and SVD work on; 12 is what was measured (docs/architecture.md)
        memory=8 * 12 * largest + 4 * numbers,
        seconds=_seconds(fleet, modules, k, k_in, alternations),
    )


def _seconds(
    fleet: Fleet, modules: dict[str, dict[str, int]], k: int | float, k_in: int | None, alternations: int
) -> float:
    """One module of a few sources is built and timed; the rest follows from how the work grows, (out + in)·ranks²."""
    costs = {name: _cost(m["out"], m["in"], m["ranks"]) for name, m in modules.items()}
    name = min(costs, key=costs.__getitem__)
    members = [source for source in fleet.sources if name in source.keys and source.norms[name] > 0][:TIMED_SOURCES]
    updates = [source.factors(name) for source in members]
    weights = [1 / source.norms[name] for source in members]
    began = time.perf_counter()
    hosvd(updates, weights, k, k_in, alternations)
    took = time.perf_counter() - began
    return took * sum(costs.values()) / _cost(*updates[0].shape, sum(update.rank for update in updates))


def _cost(out: int, inner: int, ranks: int) -> float:
    return float(sum(d * ranks * min(d, ranks) for d in (out, inner)))
