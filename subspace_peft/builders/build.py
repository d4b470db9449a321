"""`build_basis`: from source adapters to a basis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..basis import ModuleBasis, SubspaceBasis
from ..errors import SubspaceError
from .budget import check_asked, check_budget, largest, measure, spread, what_was_spent
from .complete import check_filling, complete_built
from .controls import build_control
from .distributed import ProcessGroup, process_group
from .distributed_modules import collect, divide, work
from .fleet import Fleet, gather
from .hosvd import Pair, exact, factor_pca, hosvd
from .left_out import left_out_energy, wanted
from .memory import CORES_KEPT_UP_TO, MemoryPlan, parse_size
from .reader import Reader
from .record import source_entry
from .resume import WorkFolder
from .statistics import certificate, module_basis
from .streaming import compress
from .weights import read_weights, weighted

BUILDERS = ("adapters", "eigenlora", "random", "base-weights")


def build_basis(
    sources: Iterable[Any] | None = None,
    *,
    k: int | float | None = None,
    k_in: int | None = None,
    budget: int | None = None,
    builder: str = "adapters",
    weights: str | Path | Mapping[str, float] = "equal",
    alternations: int = 10,
    directions: int = 0,
    keep_cores: bool | None = None,
    leave_one_out: bool | None = None,
    complete: str | None = None,
    like: SubspaceBasis | None = None,
    base_model: nn.Module | None = None,
    target_modules: str | Sequence[str] | None = None,
    seed: int = 0,
    skip_bad: bool = False,
    partial: bool = False,
    allow_bin: bool = False,
    max_memory: int | str = "2GB",
    work_folder: str | Path | None = None,
    token: str | bool | None = None,
    progress: bool = True,
) -> SubspaceBasis:
    """Build a shared basis: per target module an orthonormal output basis U (out, k_out) and input basis V (k_in, in).

    Args:
        sources: the fleet, a list (one alone counts as a list of one): LoRA folders, LoRA files of diffusers or kohya,
            Hub ids (``org/name@revision:folder``), patterns (``loras/*``), text files of such references
            (``fleet.txt``), Hub collections (``collection:owner/slug``), state dicts, ``(state_dict, config)`` pairs
            or live PeftModels. Rank, scaling and target modules are read from each. Not needed by the last two
            builders.
        k: directions per side, or a share of energy in (0, 1) that every module has to keep; default 32.
        k_in: directions on the input side where they differ from `k`.
        budget: instead of `k`, what a task may train in all, Σ k_out·k_in over modules: spread over modules and sides
            to where the fleet holds most above its strength-matched null, see `budget.spread`. What holds no more than
            the null is not bought, so less may be spent. Takes three to five times as long (`adapters` only).
        builder: ``adapters``: truncated HOSVD of the updates ΔW, free of the factors' gauge, with alternations
            (JD-Full, arXiv 2407.00066). ``eigenlora``: PCA of the raw factors (arXiv 2502.04700), for comparison.
            ``random``: zero-mean Gaussian, orthonormalised, the control. ``base-weights``: top singular vectors of the
            base model's weights (LoRA-XS, arXiv 2405.17604), the other control.
        weights: ``equal``: every source's ΔW counts as of norm 1 in every module. ``norm``: as large as it is. A
            mapping, or a JSON file of one, from source (its name or place) to a number: as often as that, of norm 1;
            others once. In each case the members of a shared-seed group share one vote.
        alternations: at most this many rounds after the HOSVD (`adapters` only).
        directions: how many direction tensors G to keep for the `directions` coefficients: the leading principal
            axes of the sources' cores, or random orthonormal ones where there is no fleet.
        keep_cores: whether the sources' own cores are stored, for starts at a named source; default: up to 64 sources.
        leave_one_out: measure what a basis built without a source keeps of it (`adapters` only): one more build per
            shared-seed group, of the modules that are decomposed exactly; default: for fleets of 2 to 8 groups.
        complete: where the fleet spans fewer than `k` directions, fill up with ``random`` or ``base-weights`` ones,
            see `complete_basis`; None: the basis is smaller then, and nothing is made up.
        like: a basis whose modules and sizes the `random` builder takes over.
        base_model: the model whose modules and weights `random` and `base-weights` take, with `target_modules`. The
            other builders need it for sources of PEFT's other methods, which `convert_to_lora` turns into LoRA. It is
            left as it was.
        target_modules: names or ends of names of `base_model`'s modules, or a regular expression, as in PEFT.
        seed: of the `random` builder and of random directions.
        skip_bad: leave bad sources out, with their reasons in ``basis.info["skipped"]``, instead of raising.
        partial: allow modules that only some sources adapt; each is then built from those.
        allow_bin: take pickled sources (``adapter_model.bin``) too, read with ``weights_only=True``.
        max_memory: what building may take beside the interpreter, its libraries and sources in memory (those given so,
            converted or pickled ones): bytes, or a text like ``2GB``. The basis is the same whatever it is.
        work_folder: where finished modules are kept, so that a call with the same sources and arguments goes on where
            an interrupted one stopped, to the same bytes. Remove it when the basis is saved.
        token: as in huggingface_hub.
        progress: show bars for what takes over two seconds.

    Small stacks of updates are decomposed exactly, in float64; large ones by block power iteration, products in
    float32. What that can have missed is bounded: ``basis.info["measured"]["certificates"]`` holds per module the
    energy kept beside the bound.

    In a script that `accelerate launch` (or torchrun) started as several processes, all of them have to call this,
    with the same arguments. They divide the reading of files and the modules among them, and each returns the whole
    basis, with the bytes that one process with as many threads would have given it. `max_memory` is each process's
    own. Disks need not be shared.

    Returns:
        A basis in memory, float32, every tensor's sign fixed: same bytes from same inputs on one platform.

    Raises:
        SourceError: bad sources; lists all of them.
        SubspaceError: arguments that clash; too little memory, with the least that suffices.
        ProcessError: another process of the build has failed or gone; names it.
        OSError: the disk refuses what is to be kept in `work_folder`.
    """
    with process_group() as processes:
        check_asked(budget, k, k_in, builder, complete)
        k = 32 if k is None else k
        _check_arguments(k, k_in, builder, directions)
        kind, source_weights = read_weights(weights)
        if complete is not None:
            check_filling(complete, base_model)
            if isinstance(k, float) or builder not in ("adapters", "eigenlora"):
                raise SubspaceError(
                    f"complete={complete!r}: a fleet's basis is filled up to a number of directions. Give k as a"
                    " number, and the builder `adapters` or `eigenlora`."
                )
        arguments = {
            "k": k,
            "k_in": k_in,
            "builder": builder,
            "weights": source_weights or kind,
            "alternations": alternations,
            "directions": directions,
            "seed": seed,
            "keep_cores": keep_cores,
            "partial": partial,
            "allow_bin": allow_bin,
        }
        if builder in ("random", "base-weights"):
            return build_control(
                builder,
                sources=sources,
                like=like,
                base_model=base_model,
                target_modules=target_modules,
                k=k,
                k_in=k_in,
                directions=directions,
                seed=seed,
                token=token,
                progress=progress and processes.main,
                arguments=arguments,
                allow_bin=allow_bin,
                skip_bad=skip_bad,
            )
        if sources is None:
            raise SubspaceError(f"The builder {builder!r} needs source adapters; pass their folders or Hub ids.")
        memory = parse_size(max_memory)
        fleet = gather(
            sources,
            skip_bad=skip_bad,
            partial=partial,
            token=token,
            progress=progress,
            allow_bin=allow_bin,
            base_model=base_model,
            processes=processes,
        )
        if source_weights:
            fleet = weighted(fleet, source_weights)
        if budget is not None:
            arguments = {**arguments, "k": None, "budget": budget}
        found, tables = _build_modules(
            fleet,
            processes,
            memory,
            arguments,
            k,
            leave_one_out=leave_one_out,
            work_folder=work_folder,
            progress=progress,
        )
        modules = {name: module for name, (module, _) in found.items()}
        info = _info(fleet, builder, arguments, modules, {name: known for name, (_, known) in found.items()})
        if budget is not None:
            info["measured"]["budget"] = what_was_spent(modules, tables)
        basis = SubspaceBasis(modules, info)
        if complete is None:
            return basis
        basis.info["build"] = {**arguments, "complete": complete}
        return complete_built(basis, (int(k), k_in or int(k)), complete, base_model, seed, progress and processes.main)


def _build_modules(
    fleet: Fleet,
    processes: ProcessGroup,
    memory: int,
    arguments: Mapping[str, Any],
    k: int | float,
    *,
    leave_one_out: bool | None,
    work_folder: str | Path | None,
    progress: bool,
) -> tuple[dict[str, tuple[ModuleBasis, dict[str, Any]]], dict[str, torch.Tensor]]:
    """All modules' bases and what is known of them, each built by one process of the group; with a budget also what it
    was spread by."""
    builder, k_in, budget = arguments["builder"], arguments["k_in"], arguments.get("budget")
    keep_cores = arguments["keep_cores"]
    if keep_cores is None:
        keep_cores = len(fleet.sources) <= CORES_KEPT_UP_TO
    measure_left_out = builder == "adapters" and wanted(leave_one_out, fleet.groups)
    if budget is not None:
        check_budget(budget, len(fleet.modules))
        k = largest(budget, len(fleet.modules))
    weights = arguments["weights"]
    cores = (len(fleet.sources) if keep_cores else 0) + arguments["directions"]
    plan = MemoryPlan(fleet, builder, k, k_in, weights if isinstance(weights, str) else "equal", memory, cores)
    kept = None
    if work_folder is not None:
        made_with = {**arguments, "keep_cores": keep_cores, "leave_one_out": measure_left_out}
        kept = WorkFolder(Path(work_folder), fleet.sources, made_with)
        processes.marker = kept.folder / f"failed-{processes.run}" if processes.count > 1 else None
    # what an interrupted build finished is not read again
    done = {name: found for name in fleet.modules if kept is not None and (found := kept.get(name)) is not None}
    mine, owners = divide(processes, {name: plan.module(name).cost for name in fleet.modules}, done)
    reader = Reader(fleet.sources, plan.held)
    sizes: dict[str, tuple[int | float, int | None]] = dict.fromkeys(fleet.modules, (k, k_in))
    tables: dict[str, torch.Tensor] = {}
    if budget is not None:
        tables = measure(plan, reader, int(k), kept, processes, progress)
        sizes.update(spread(tables, budget))

    def one(name: str) -> None:
        done[name] = _build_module(
            plan,
            reader,
            name,
            *sizes[name],
            arguments["alternations"],
            directions=arguments["directions"],
            keep_cores=keep_cores,
            measure_left_out=measure_left_out,
        )
        if kept is not None:
            kept.put(name, *done[name])

    work(processes, reader, mine, len(fleet.modules), "building", progress, one)
    return collect(processes, owners, done), tables


def _build_module(
    plan: MemoryPlan,
    reader: Reader,
    name: str,
    k: int | float,
    k_in: int | None,
    alternations: int,
    *,
    directions: int,
    keep_cores: bool,
    measure_left_out: bool,
) -> tuple[ModuleBasis, dict[str, Any]]:
    """One module's basis, and what is known of it.

    That is ``energies``, per source the share of its energy kept (None where it does not adapt the module);
    ``left_out``, per member the share that a basis without its group keeps of it, where that was asked for and the
    module is decomposed exactly: another streamed build per group would cost as many passes over the files again; and
    the ``certificate``.
    """
    fleet, task = plan.fleet, plan.module(name)
    raw = plan.builder == "eigenlora"
    rounds = 0 if raw else alternations
    pair: Pair | None = None
    left_out: list[float | None] = []
    if task.exact:
        if raw:
            pairs = ((B.double(), A.double()) for B, A in (reader.pair(i, name) for i in task.members))
            compressed = factor_pca(list(pairs), task.scales, task.weighted, task.energy)
        else:
            updates = task.updates(reader)
            compressed = exact(updates, task.weights)
        pair = hosvd(compressed, k, k_in, rounds)
        if measure_left_out and pair is not None:
            groups = [fleet.groups[i] for i in task.members]
            left_out = left_out_energy(updates, task.weights, groups, pair, rounds)
    else:
        stack = task.stack(reader, keep=plan.keep, raw=raw)
        width = task.width
        while pair is None:
            compressed = compress(stack, width, leading=task.leading)
            pair = hosvd(compressed, k, k_in, rounds)
            # a share of energy takes as many directions as it takes
            width *= 2
    assert pair is not None
    module, shares = module_basis(
        pair,
        compressed,
        task.norms,
        task.source_weights,
        task.members,
        directions=directions,
        fleet_size=len(fleet.sources),
        keep_cores=keep_cores,
    )
    energies: list[float | None] = [None] * len(fleet.sources)
    for i, share in zip(task.members, shares, strict=True):
        energies[i] = share
    return module, {
        "energies": energies,
        "left_out": left_out,
        "certificate": certificate(pair, compressed, both=not raw),
    }


def _check_arguments(k: int | float, k_in: int | None, builder: str, directions: int) -> None:
    if builder not in BUILDERS:
        raise SubspaceError(f"There is no builder {builder!r}; choose one of {', '.join(BUILDERS)}.")
    if isinstance(k, bool) or (isinstance(k, float) and not 0 < k < 1) or (isinstance(k, int) and k < 1):
        raise SubspaceError(f"k={k!r}: give a number of directions (1, 2, …) or a share of energy to keep (0.5).")
    if isinstance(k, float) and (builder != "adapters" or k_in is not None):
        raise SubspaceError("A share of energy as k is for the builder `adapters`, and decides k_in itself.")
    if k_in is not None and k_in < 1:
        raise SubspaceError(f"k_in={k_in}: give at least 1.")
    if directions < 0:
        raise SubspaceError(f"directions={directions}: give 0 or more.")


def _mean_left_out(shares: dict[str, list[float | None]]) -> dict[str, Any]:
    means = {
        name: sum(known) / len(known)
        for name, each in shares.items()
        if (known := [share for share in each if share is not None])
    }
    if not means:
        return {}
    return {"energy_left_out": sum(means.values()) / len(means), "energy_left_out_per_module": means}


def _info(
    fleet: Fleet,
    builder: str,
    arguments: dict[str, Any],
    modules: dict[str, ModuleBasis],
    found: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    energies: dict[str, list[float | None]] = {name: each["energies"] for name, each in found.items()}
    entries = []
    for i, source in enumerate(fleet.sources):
        kept = {name: energies[name][i] for name in source.norms if name in energies}
        entries.append(source_entry(source, kept, fleet.groups[i]))
    per_module = {
        name: sum(known) / len(known)
        for name, shares in energies.items()
        if (known := [s for s in shares if s is not None])
    }
    random = {name: m.k_out * m.k_in / (m.out_features * m.in_features) for name, m in modules.items()}
    return {
        "base_model_name_or_path": fleet.base_model,
        "builder": builder,
        "build": arguments,
        "sources": entries,
        "skipped": fleet.skipped,
        "measured": {
            "energy_kept": sum(per_module.values()) / len(per_module),
            "energy_random": sum(random.values()) / len(random),
            "energy_kept_per_module": per_module,
            "energy_random_per_module": random,
            "certificates": {name: each["certificate"] for name, each in found.items()},
            **_mean_left_out({name: each["left_out"] for name, each in found.items()}),
        },
    }
