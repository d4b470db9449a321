"""What a build would do, before it does it: every source is read and checked, one module is timed, nothing is
built."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from .budget import check_asked, check_budget, even, largest
from .fleet import gather
from .hosvd import exact, hosvd
from .memory import CORES_KEPT_UP_TO, MemoryPlan, parse_size
from .module_plan import ModulePlan
from .module_stack import ModuleStack
from .streaming import compress

TIMED_SOURCES = 16


@dataclass(frozen=True)
class BuildPlan:
    """What `plan_build` found.

    Attributes:
        base_model: of the sources, or None.
        sources: per usable source its name, location, revision, base_model, ranks, modules, norm (of ΔW, Frobenius),
            bytes, seed_group.
        skipped: the others, each with its reason; without ``skip_bad`` they are what the build would raise.
        modules: per module its ``out``, ``in``, how many ``sources`` adapt it, the sum of their ``ranks``, ``k_out``
            and ``k_in``.
        bytes_to_read: of the sources' files; a build reads them twice, of a module whose factors do not fit in
            `max_memory` more often.
        bytes_of_basis: of U, V and the cores in the basis's file.
        memory: estimated peak in bytes, beside Python, its libraries and sources held in memory.
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
    k: int | float | None = None,
    k_in: int | None = None,
    budget: int | None = None,
    alternations: int = 10,
    complete: str | None = None,
    partial: bool = False,
    allow_bin: bool = False,
    max_memory: int | str = "2GB",
    base_model: nn.Module | None = None,
    token: str | bool | None = None,
    progress: bool = True,
) -> BuildPlan:
    """Read and check a fleet as `build_basis` would, and say what building its basis takes. Arguments as there.

    What comes from the Hub is fetched. Where `k` is a share of energy, sizes are those of the largest basis it could
    ask for; with a `budget`, which only building can spread, those of an even spread.

    Raises:
        SourceError: no source is usable.
        SubspaceError: `max_memory` is too little; a module to which no source contributes.
    """
    check_asked(budget, k, k_in, "adapters", complete)
    memory = parse_size(max_memory)
    fleet = gather(
        sources,
        skip_bad=True,
        partial=partial,
        token=token,
        progress=progress,
        allow_bin=allow_bin,
        base_model=base_model,
    )
    if budget is not None:
        check_budget(budget, len(fleet.modules))
        k = even(budget, len(fleet.modules))
    k = 32 if k is None else k
    most = k if budget is None else largest(budget, len(fleet.modules))
    cores = len(fleet.sources) if len(fleet.sources) <= CORES_KEPT_UP_TO else 0
    plan = MemoryPlan(fleet, "adapters", most, k_in, "equal", memory, cores)
    tasks = {name: plan.module(name) for name in fleet.modules}
    modules = {}
    for name, task in tasks.items():
        (out, inner), ranks = task.shape, sum(task.ranks)
        most = max(ranks, k, k_in or 0) if complete else ranks
        a, b = (min(ranks if isinstance(k, float) else size, most, d) for size, d in ((k, out), (k_in or k, inner)))
        modules[name] = {"out": out, "in": inner, "sources": len(task.members), "ranks": ranks, "k_out": a, "k_in": b}
    numbers = sum(m["k_out"] * m["out"] + m["k_in"] * m["in"] for m in modules.values())
    numbers += cores * sum(m["k_out"] * m["k_in"] for m in modules.values())
    entries = [
        {
            "name": source.name,
            "location": source.location,
            "revision": source.revision,
            "sha256": source.sha256,
            "base_model": source.base_model,
            "ranks": source.ranks,
            "modules": len(source.keys),
            "norm": sum(norm**2 for norm in source.norms.values()) ** 0.5,
            "bytes": source.file.stat().st_size if source.file else 0,
            "seed_group": group,
        }
        for source, group in zip(fleet.sources, fleet.groups, strict=True)
    ]
    return BuildPlan(
        base_model=fleet.base_model,
        sources=entries,
        skipped=fleet.skipped,
        modules=modules,
        bytes_to_read=sum(entry["bytes"] for entry in entries),
        bytes_of_basis=4 * numbers,
        memory=min(memory, plan.needed + plan.keep + sum(entry["bytes"] for entry in entries)),
        # a budget is spread by what the fleet and its null hold, each of which costs about as much as building
        seconds=_seconds(plan, tasks, k, k_in, alternations) * (1 if budget is None else 3),
    )


def _seconds(
    plan: MemoryPlan, tasks: dict[str, ModulePlan], k: int | float, k_in: int | None, alternations: int
) -> float:
    """Of each kind, exact and streamed, one module of a few sources is built and timed; the rest follows from how the
    work grows."""
    total = 0.0
    for exactly in (True, False):
        costs = {name: task.cost for name, task in tasks.items() if task.exact == exactly}
        if not costs:
            continue
        name = min(costs, key=costs.__getitem__)
        some = _first(tasks[name], TIMED_SOURCES)
        sources = [plan.fleet.sources[i] for i in some.members]
        if exactly:
            updates = [source.factors(name) for source in sources]
            began = time.perf_counter()
            hosvd(exact(updates, some.weights), k, k_in, alternations)
        else:
            pairs = [source.raw(name) for source in sources]
            stack = ModuleStack(pairs.__getitem__, some.ranks, some.shape, some.scales, some.weights, some.energy)
            began = time.perf_counter()
            hosvd(compress(stack, some.width, leading=some.leading), plan.k, k_in, alternations)
        total += (time.perf_counter() - began) * sum(costs.values()) / some.cost
    return total


def _first(task: ModulePlan, count: int) -> ModulePlan:
    energies = [(w * norm) ** 2 for w, norm in zip(task.weights, task.norms, strict=True)]
    lists = ("members", "ranks", "norms", "source_weights", "scales", "weights", "weighted")
    cut = {name: getattr(task, name)[:count] for name in lists}
    return replace(task, **cut, energy=sum(energies[:count]))
