"""A build's plan, before it is built: all its checks are made, one module is timed, and nothing is built."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from .._shown import Shown, Table, short
from .._shown import size as in_bytes
from ..basis import SubspaceBasis
from ..basis.stored_size import ModuleSize, stored_bytes
from ..errors import SubspaceError
from .budget import even
from .clusters import MOST, prepare_clusters
from .controls import control_module
from .fleet import Fleet
from .hosvd import exact, hosvd
from .ignored import warn_of_ignored
from .keywords import takes_options
from .memory import CORES_KEPT_UP_TO, MemoryPlan
from .module_plan import ModulePlan
from .module_stack import ModuleStack
from .options import BuildOptions, Resources
from .prepare import ControlBuild, FleetBuild, prepare
from .rebuild import read_record
from .streaming import compress
from .update import PreparedUpdate, prepare_update

TIMED_SOURCES = 16


@dataclass(frozen=True, repr=False)
class BuildPlan(Shown):
    """The plan of a build.

    Attributes:
        base_model: of the sources, or None.
        sources: per usable source its name, location, revision, base_model, ranks, modules, norm (of ΔW, Frobenius),
            bytes, seed_group.
        skipped: the others, each with its reason; without ``skip_bad`` they are what the build would raise.
        modules: per module its ``out``, ``in``, how many ``sources`` adapt it, the sum of their ``ranks``, ``k_out``
            and ``k_in``.
        bytes_to_read: of the sources' files; a build reads them twice, of a module whose factors do not fit in
            `max_memory` more often.
        bytes_of_basis: of the basis's file, or of all clusters' files together; with ``auto`` clusters of one basis.
        memory: estimated peak in bytes, beside Python, its libraries and sources held in memory.
        seconds: estimated time of building, reading aside, on this machine.
        bytes_at_most: with ``auto`` clusters, of the files of as many as there may be; else as `bytes_of_basis`.
    """

    base_model: str | None
    sources: list[dict[str, Any]]
    skipped: list[dict[str, str]]
    modules: dict[str, dict[str, int]]
    bytes_to_read: int
    bytes_of_basis: int
    memory: int
    seconds: float
    bytes_at_most: int = 0

    def _shown_facts(self) -> Iterator[tuple[str, Any]]:
        yield "sources", len(self.sources)
        yield "left out", len(self.skipped) or None
        yield "modules", len(self.modules)
        yield "base model", short(self.base_model)
        yield "to read", in_bytes(self.bytes_to_read)
        yield "basis", in_bytes(self.bytes_of_basis)
        yield "memory", in_bytes(self.memory)
        yield "time", f"about {self.seconds:,.0f} s" if self.seconds >= 1 else "under a second"

    def _shown_table(self) -> Table:
        rows = (
            (name, f"{m['out']} × {m['in']}", m["sources"], f"{m['k_out']}, {m['k_in']}")
            for name, m in self.modules.items()
        )
        return ("module", "out × in", "sources", "k out, k in"), rows, len(self.modules)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON-ready values."""
        return asdict(self)


@takes_options(options=BuildOptions, resources=Resources)
def plan_build(
    sources: Iterable[Any] | None = None,
    *,
    options: BuildOptions,
    resources: Resources,
    like: SubspaceBasis | None = None,
    base_model: nn.Module | None = None,
    clusters: int | str | None = None,
    precision: str = "float32",
) -> BuildPlan:
    """Check everything that `build_basis` would, and say how much building the basis takes.

    Adapters on the Hub are fetched. Where `k` is a share of energy, sizes are those of the largest basis it could ask
    for; with a `budget`, which only building can spread, those of an even spread.

    Args:
        sources: as in `build_basis`. Bad ones are listed in the plan.
        options: as in `build_basis`; its fields are keywords of their own, too.
        resources: as in `build_basis`; its fields are keywords of their own, too.
        like: as in `build_basis`.
        base_model: as in `build_basis`.
        clusters: as in `build_clusters`, of which this is the plan then: of one basis of all sources,
            which takes about as much as all clusters' bases do, their comparison aside; files are counted for each.
        precision: what the basis is then stored as, see `SubspaceBasis.to_precision`.

    Raises:
        SourceError: no source is usable.
        SubspaceError: the build would raise it.
    """
    if clusters is not None and like is not None:
        raise SubspaceError("clusters= does not go with like=: clusters are of sources.")
    warn_of_ignored(options, sources=sources, like=like, base_model=base_model)
    options = replace(options, skip_bad=True)
    if clusters is not None:
        build = prepare_clusters(sources, clusters, options, resources, base_model=base_model)
        if clusters != "auto":
            return _plan(build, precision, int(clusters))
        most = min(MOST, len(build.fleet.sources))
        plan = _plan(build, precision)
        return replace(
            plan, bytes_at_most=max(plan.bytes_of_basis, _bytes_of_fleet(build, plan.modules, precision, most))
        )
    return _plan(prepare(sources, options, resources, like=like, base_model=base_model), precision)


@takes_options(resources=Resources)
def plan_rebuild(
    basis: SubspaceBasis | str | Path,
    *,
    resources: Resources,
    base_model: nn.Module | None = None,
    precision: str | None = None,
) -> BuildPlan:
    """Check everything that `rebuild_basis` would, and say how much building the basis takes.

    Args:
        basis: as in `rebuild_basis`.
        resources: as in `build_basis`; its fields are keywords of their own, too.
        base_model: as in `rebuild_basis`.
        precision: what the basis is then stored as; by default what it is stored as now.

    Raises:
        SourceError: sources on record that are not what they were; lists all of them.
        SubspaceError: the rebuild would raise it.
    """
    record = read_record(basis, base_model=base_model, resources=resources)
    if isinstance(record.options, BuildOptions):
        build = prepare(**record.inputs(resources, base_model), options=record.options)
        return _plan(build, precision or record.basis.precision or "float32")
    update = prepare_update(**record.inputs(resources, base_model), options=record.options)
    return _plan(update, precision or "float32")


def _plan(build: FleetBuild | ControlBuild | PreparedUpdate, precision: str, clusters: int = 1) -> BuildPlan:
    if isinstance(build, ControlBuild):
        return _plan_of_control(build, precision)
    if isinstance(build, PreparedUpdate):
        return _plan_of_update(build, precision)
    options, plan, fleet = build.options, build.plan, build.fleet
    k, k_in = options.size
    if options.budget is not None:
        k = even(options.budget, len(fleet.modules))
    modules = {}
    for name in fleet.modules:
        task = plan.module(name)
        ranks = sum(task.ranks)
        # a share of energy asks for no more directions than the sources span
        wanted = (ranks, ranks) if isinstance(k, float) else (k, k_in or k)
        wanted = (plan.own[name],) * 2 if name in plan.own else wanted
        most = max(ranks, *wanted) if options.complete else ranks
        modules[name] = _size(task, *(min(size, most) for size in wanted))
    # a budget is spread by what the fleet and its null hold, each of which costs about as much as building
    seconds = _seconds(plan, k, k_in, options.alternations) * (1 if options.budget is None else 3)
    size = _bytes_of_fleet(build, modules, precision, clusters)
    return _of_fleet(fleet, plan, modules, size, seconds, build.base_model)


def _bytes_of_fleet(build: FleetBuild, modules: dict[str, dict[str, int]], precision: str, clusters: int) -> int:
    """Return the bytes of the files of a fleet's bases, each of an equal part of it."""
    options, count, total = build.options, len(build.fleet.sources), 0
    for number in range(clusters):
        part = count // clusters + (number < count % clusters)
        keep = part <= CORES_KEPT_UP_TO if options.keep_cores is None else options.keep_cores
        sizes = {}
        for name, size in modules.items():
            task = build.plan.module(name)
            # what the part spans: of all sources exactly, else about as much as its share
            ranks = size["ranks"] if clusters == 1 else max(1, round(size["ranks"] * part / count))
            k_out, k_in = (k if options.complete else min(k, ranks) for k in (size["k_out"], size["k_in"]))
            members = min(part, size["sources"])
            cores: dict[str, int | None] = {"M": None, "core_rms": None}
            cores |= {"cores": part} if keep else {}
            cores |= {"G": min(options.directions, members)} if options.directions else {}
            most = ranks if task.exact else min(ranks, task.width)
            spectra = {"spectrum_out": min(most, size["out"]), "spectrum_in": min(most, size["in"])}
            sizes[name] = ModuleSize(size["out"], size["in"], k_out, k_in, cores, spectra)
        total += stored_bytes(sizes, precision)
    return total


def _plan_of_update(update: PreparedUpdate, precision: str) -> BuildPlan:
    options, plan, fleet = update.options, update.plan, update.fleet
    old, modules = update.old.shapes(), {}
    for key, name in update.changed.items():
        task = plan.module(name)
        ranks = sum(task.ranks)
        more, more_in, bound = update.growth(name)
        add = ranks if isinstance(more, float) else more
        add_in = add if more_in is None else more_in
        own = sum(each[name][0].shape[1] for each in update.absorbed.values() if name in each)
        most = (own, own) if bound is None else (min(own, bound[0]), min(own, bound[1]))
        add, add_in = add + most[0], add_in + most[1]
        grown = (old[key]["k_out"] + min(ranks, add), old[key]["k_in"] + min(ranks, add_in))
        modules[name] = _size(task, *(options.refit or grown))
    k, k_in = options.refit or (plan.k, None)
    seconds = _seconds(plan, k, k_in, options.alternations)
    size = stored_bytes(_sizes_of_update(update, modules), precision)
    return _of_fleet(fleet, plan, modules, size, seconds, update.base_model)


def _sizes_of_update(update: PreparedUpdate, changed: dict[str, dict[str, int]]) -> dict[str, ModuleSize]:
    """Return the sizes of all modules of an updated basis; what is stored of each is as in the old one's first."""
    old, found = update.old, {}
    held = old.stored(next(iter(old)))
    more = len(update.fleet.sources)
    for key, shape in old.shapes().items():
        grown = changed[update.changed[key]] if key in update.changed else shape
        cores: dict[str, int | None] = {name: None for name in ("M", "core_rms") if name in held}
        cores |= {"cores": len(held["cores"]) + more} if "cores" in held else {}
        cores |= {"G": shape["directions"]} if shape.get("directions") else {}
        spectra = {name: len(held[name]) for name in ("spectrum_out", "spectrum_in") if name in held}
        found[key] = ModuleSize(shape["out"], shape["in"], grown["k_out"], grown["k_in"], cores, spectra)
    return found


def _of_fleet(
    fleet: Fleet,
    plan: MemoryPlan,
    modules: dict[str, dict[str, int]],
    stored: int,
    seconds: float,
    base_model: str | None,
) -> BuildPlan:
    entries = _entries(fleet)
    size = sum(entry["bytes"] for entry in entries)
    return BuildPlan(
        base_model=base_model,
        sources=entries,
        skipped=fleet.skipped,
        modules=modules,
        bytes_to_read=size,
        bytes_of_basis=stored,
        memory=min(plan.memory, plan.needed + plan.keep + size),
        seconds=seconds,
        bytes_at_most=stored,
    )


def _plan_of_control(build: ControlBuild, precision: str) -> BuildPlan:
    options, fleet = build.options, build.fleet
    modules = {}
    for name, (out, inner, k_out, k_in) in build.sizes.items():
        # base weights have no more singular vectors than their smaller side
        most = (min(out, inner),) * 2 if options.builder == "base-weights" else (out, inner)
        size = {"out": out, "in": inner, "sources": 0, "ranks": 0}
        modules[name] = {**size, "k_out": min(k_out, most[0]), "k_in": min(k_in, most[1])}
    entries = [] if fleet is None else _entries(fleet)
    numbers = {name: out * inner * min(out, inner) for name, (out, inner, _, _) in build.sizes.items()}
    name = min(numbers, key=numbers.__getitem__)
    began = time.perf_counter()
    control_module(name, build.sizes[name], options, build.weights.get(name))
    seconds = (time.perf_counter() - began) * sum(numbers.values()) / numbers[name]
    sizes = {
        name: ModuleSize(
            size["out"],
            size["in"],
            size["k_out"],
            size["k_in"],
            {"G": min(options.directions, size["k_out"] * size["k_in"])} if options.directions else {},
            {},
        )
        for name, size in modules.items()
    }
    basis = stored_bytes(sizes)
    stored = stored_bytes(sizes, precision)
    largest = max(out * inner for out, inner, _, _ in build.sizes.values())
    return BuildPlan(
        base_model=build.base_model,
        sources=entries,
        skipped=[] if fleet is None else fleet.skipped,
        modules=modules,
        bytes_to_read=sum(entry["bytes"] for entry in entries),
        bytes_of_basis=stored,
        bytes_at_most=stored,
        # the basis as built and as written, and one module's decomposition in float64
        memory=2 * basis + 3 * 8 * largest,
        seconds=seconds,
    )


def _size(task: ModulePlan, k_out: int, k_in: int) -> dict[str, int]:
    out, inner = task.shape
    size = {"out": out, "in": inner, "sources": len(task.members), "ranks": sum(task.ranks)}
    return {**size, "k_out": min(k_out, out), "k_in": min(k_in, inner)}


def _entries(fleet: Fleet) -> list[dict[str, Any]]:
    return [
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


def _seconds(plan: MemoryPlan, k: int | float, k_in: int | None, alternations: int) -> float:
    """Estimate how long all modules take.

    Of each kind, exact and streamed, one module of a few sources is built and timed; the rest follows from how the
    work grows.
    """
    total = 0.0
    tasks = {name: plan.module(name) for name in plan.fleet.modules}
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
