"""`build_basis`: from source adapters to a basis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import energy
from .._io.progress import progress_bar
from ..basis import ModuleBasis, SubspaceBasis
from .base_model import keep_weights
from .budget import measure, spread, what_was_spent
from .complete import complete_built
from .controls import control_module
from .distributed import ProcessGroup, process_group
from .distributed_modules import collect, divide, work
from .fleet import Fleet
from .hosvd import Pair, exact, factor_pca, hosvd, size_of
from .ignored import fewer_directions, warn_of_fewer, warn_of_ignored, warn_of_width
from .keywords import takes_options
from .left_out import left_out_energy
from .null import null_energy
from .options import BuildOptions, Resources
from .prepare import ControlBuild, FleetBuild, prepare
from .reader import Reader
from .record import source_entry
from .statistics import certificate, module_basis
from .streaming import compress

Found = dict[str, tuple[ModuleBasis, dict[str, Any]]]  # by module


@process_group()
@takes_options(options=BuildOptions, resources=Resources)
def build_basis(
    sources: Iterable[Any] | None = None,
    *,
    options: BuildOptions,
    resources: Resources,
    like: SubspaceBasis | str | Path | None = None,
    base_model: nn.Module | None = None,
) -> SubspaceBasis:
    """Build a shared basis: per target module an orthonormal output basis U (out, k_out) and input basis V (k_in, in).

    Small stacks of updates are decomposed exactly, in float64; large ones by block power iteration, products in
    float32. What that can have missed is bounded: ``basis.info["measured"]["certificates"]`` holds per module the
    energy kept beside the bound.

    In a script that `accelerate launch` (or torchrun) started as several processes, all of them have to call this,
    with the same arguments. They divide the reading of files and the modules among them, and each returns the whole
    basis, with the bytes that one process with as many threads would have given it. Disks need not be
    shared.

    Args:
        sources: the fleet, a list (one alone counts as a list of one): LoRA folders, LoRA files of diffusers or kohya,
            Hub ids (``org/name@revision:folder``), patterns (``loras/*``), text files of such references
            (``fleet.txt``), Hub collections (``collection:owner/slug``), state dicts, ``(state_dict, config)`` pairs
            or live PeftModels. Rank, scaling and target modules are read from each. The builders `random` and
            `base-weights` need none.
        options: which basis to build; its fields are keywords of their own, too.
        resources: how much building may take; its fields are keywords of their own, too.
        like: a basis, or its place, whose modules and sizes the `random` builder takes over.
        base_model: the model whose modules and weights `random` and `base-weights` take, with `target_modules`. The
            other builders need it for sources of PEFT's other methods, which `convert_to_lora` turns into LoRA. It is
            left as it was.

    Returns:
        A basis in memory, float32, every tensor's sign fixed: same bytes from same inputs on one platform.

    Raises:
        SourceError: bad sources; lists all of them.
        SubspaceError: arguments that clash; too little memory, with the least that suffices.
        ProcessError: another process of the build has failed or gone; names it.
        OSError: the disk refuses what is to be kept in `work_folder`.
    """
    with process_group() as processes:
        if processes.main:
            warn_of_ignored(options, sources=sources, like=like, base_model=base_model)
        basis = built(sources, options, resources, like=like, base_model=base_model)
        if processes.main:
            warn_of_fewer(basis.info.get("measured", {}).get("fewer_directions"), len(basis))
            if like is None:
                warn_of_width(options, basis.shapes().values())
        return basis


def built(
    sources: Iterable[Any] | None,
    options: BuildOptions,
    resources: Resources,
    *,
    like: SubspaceBasis | str | Path | None = None,
    base_model: nn.Module | None = None,
) -> SubspaceBasis:
    """Build a basis as `build_basis` does, and say nothing of its arguments: they may be those of a record."""
    with process_group() as processes:
        build = prepare(sources, options, resources, like=like, base_model=base_model, processes=processes)
        return _build_control(build, processes) if isinstance(build, ControlBuild) else _build_fleet(build, processes)


def _build_fleet(build: FleetBuild, processes: ProcessGroup) -> SubspaceBasis:
    found, tables = _build_modules(build, processes)
    modules = {name: module for name, (module, _) in found.items()}
    info = _info(build, found)
    if build.options.budget is not None:
        info["measured"]["budget"] = what_was_spent(modules, tables)
    elif build.options.complete is None and (short := fewer_directions(modules, build.options, build.plan.own)):
        info["measured"]["fewer_directions"] = short
    basis = SubspaceBasis(modules, info)
    keep_weights(basis, build.model)
    if build.options.complete is None:
        return basis
    progress = build.resources.progress and processes.main
    return complete_built(basis, build.options, build.filling, progress)


def _build_control(build: ControlBuild, processes: ProcessGroup) -> SubspaceBasis:
    options, modules = build.options, {}
    shown = build.resources.progress and processes.main
    bar = progress_bar(build.sizes, desc=f"building ({options.builder})", unit="module", shown=shown)
    for name in bar:
        modules[name] = control_module(name, build.sizes[name], options, build.weights.get(name))
    info = {
        "base_model_name_or_path": build.base_model,
        "builder": options.builder,
        "build": options.record(),
        "sources": [],
        "skipped": [],
    }
    basis = SubspaceBasis(modules, info)
    keep_weights(basis, build.model)
    return basis


def _build_modules(build: FleetBuild, processes: ProcessGroup) -> tuple[Found, dict[str, torch.Tensor]]:
    """Build all modules, each in one process of the group.

    Returns:
        Per module its basis and the facts about it; and per module the table that a budget was spread by, if any.
    """
    options, plan, kept = build.options, build.plan, build.kept
    names = build.fleet.modules
    progress = build.resources.progress
    if kept is not None:
        processes.marker = kept.folder / f"failed-{processes.run}" if processes.count > 1 else None
    # modules that an interrupted build finished are not read again
    done = {name: found for name in names if kept is not None and (found := kept.get(name)) is not None}
    mine, owners = divide(processes, {name: plan.module(name).cost for name in names}, done)
    reader = Reader(build.fleet.sources, plan.held)
    sizes: dict[str, tuple[int | float, int | None]] = dict.fromkeys(names, options.size)
    sizes.update({name: (k, None) for name, k in plan.own.items()})
    tables: dict[str, torch.Tensor] = {}
    if options.budget is not None:
        tables = measure(plan, reader, plan.k, kept, processes, progress)
        sizes.update(spread(tables, options.budget))

    def one(name: str) -> None:
        done[name] = _build_module(build, reader, name, *sizes[name])
        if kept is not None:
            kept.put(name, *done[name])

    work(processes, reader, mine, len(names), "building", progress, one)
    return collect(processes, owners, done), tables


def _build_module(
    build: FleetBuild, reader: Reader, name: str, k: int | float, k_in: int | None
) -> tuple[ModuleBasis, dict[str, Any]]:
    """Build one module's basis.

    Returns:
        The basis, and the facts about it: ``energies``, per source the share of its energy kept (None where it does
        not adapt the module); ``left_out``, per member the share that a basis without its group keeps of it, where
        that was asked for and the module is decomposed exactly (another streamed build per group would cost as many
        passes over the files again); ``null``, there too, what a basis of noise of equal strength keeps of that noise;
        and the ``certificate``.
    """
    plan, fleet, options = build.plan, build.fleet, build.options
    task = plan.module(name)
    raw = options.builder == "eigenlora"
    rounds = 0 if raw else options.alternations
    pair: Pair | None = None
    left_out: list[float | None] = []
    null: list[float] = []
    if task.exact:
        if raw:
            pairs = ((B.double(), A.double()) for B, A in (reader.pair(i, name) for i in task.members))
            compressed = factor_pca(list(pairs), task.scales, task.weighted, task.energy)
        else:
            updates = task.updates(reader)
            compressed = exact(updates, task.weights)
        pair = hosvd(compressed, k, k_in, rounds)
        if build.leave_one_out and pair is not None:
            groups = [fleet.groups[i] for i in task.members]
            left_out = left_out_energy(updates, task.weights, groups, size_of(pair), rounds)
            null = null_energy(updates, task.weights, size_of(pair), rounds)
    else:
        stack = task.stack(reader, keep=plan.keep, raw=raw)
        width = task.width
        while pair is None:
            compressed = compress(stack, width, leading=task.leading)
            pair = hosvd(compressed, k, k_in, rounds)
            # a share of energy may take more directions than the subspace is wide
            width *= 2
    assert pair is not None
    module, shares = module_basis(
        pair,
        compressed,
        task.norms,
        task.source_weights,
        task.members,
        directions=options.directions,
        fleet_size=len(fleet.sources),
        keep_cores=build.keep_cores,
    )
    return module, {
        "energies": _of_fleet(shares, task.members, fleet),
        "left_out": _of_fleet(left_out, task.members, fleet),
        "null": _of_fleet(null, task.members, fleet),
        "certificate": certificate(pair, compressed, both=not raw),
    }


def _of_fleet(shares: Sequence[float | None], members: Sequence[int], fleet: Fleet) -> list[float | None]:
    """Return the members' shares as one per source of the fleet; empty where none was measured."""
    if not shares:
        return []
    found: list[float | None] = [None] * len(fleet.sources)
    for i, share in zip(members, shares, strict=True):
        found[i] = share
    return found


def _info(build: FleetBuild, found: Found) -> dict[str, Any]:
    """Return the basis's record: sources, options, and what was measured."""
    fleet, options = build.fleet, build.options
    facts = {name: known for name, (_, known) in found.items()}
    norms = [source.norms for source in fleet.sources]

    def of(i: int, key: str) -> dict[str, float | None]:
        return {name: facts[name][key][i] for name in norms[i] if name in facts and facts[name].get(key)}

    entries = [
        {
            **source_entry(source, of(i, "energies"), fleet.groups[i], of(i, "left_out")),
            **({} if fleet.weights is None else {"counts": fleet.weights[i]}),
        }
        for i, source in enumerate(fleet.sources)
    ]
    random = {name: m.k_out * m.k_in / (m.out_features * m.in_features) for name, (m, _) in found.items()}
    weights = energy.weights_of_modules(norms)
    shares = {
        "kept": [entry["energy_kept"] for entry in entries],
        "left_out": [entry.get("energy_left_out") for entry in entries],
        "null": [energy.of_known(of(i, "null"), each) for i, each in enumerate(norms)],
    }
    measured: dict[str, Any] = {
        "definition": energy.DEFINITION,
        "energy_random": energy.of_random(random, weights),
        "energy_random_per_module": random,
        "energy_per_module": weights,
        "certificates": {name: each["certificate"] for name, each in facts.items()},
    }
    for key, each in shares.items():
        per_module = {
            name: energy.mean(known.get("energies" if key == "kept" else key) or []) for name, known in facts.items()
        }
        if (value := energy.mean(each)) is not None:
            measured[f"energy_{key}"] = value
            measured[f"energy_{key}_per_module"] = {
                name: share for name, share in per_module.items() if share is not None
            }
    return {
        "base_model_name_or_path": build.base_model,
        **({"base_model_names": names} if (names := fleet.base_names()) else {}),
        "builder": options.builder,
        "build": options.record(),
        "sources": entries,
        "skipped": fleet.skipped,
        "measured": measured,
    }
