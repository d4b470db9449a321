"""`update_basis`: a new version of a basis, grown by what new adapters need and tasks on the old one do not lose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..basis import ModuleBasis, SubspaceBasis
from ..basis.module import tensor_sha256
from ..errors import SubspaceError
from ..hub import same_model
from ..sources.source import Source
from .fleet import gather
from .memory import GUESSED_K, MemoryPlan, parse_size
from .reader import Reader
from .resume import WorkFolder
from .update_module import OldModule, update_module
from .update_record import after_refit, record, source_weights_of

WEIGHTS = ("equal", "norm")


def update_basis(
    basis: SubspaceBasis | str | Path,
    sources: Iterable[Any],
    *,
    add: int | float = 8,
    add_in: int | None = None,
    k: int | None = None,
    k_in: int | None = None,
    cores: Iterable[Mapping[str, torch.Tensor]] = (),
    max_drift: float | None = None,
    weights: str = "equal",
    alternations: int = 10,
    skip_bad: bool = False,
    partial: bool = False,
    allow_bin: bool = False,
    base_model: nn.Module | None = None,
    max_memory: int | str = "2GB",
    work_folder: str | Path | None = None,
    token: str | bool | None = None,
    progress: bool = True,
) -> SubspaceBasis:
    """A new version of a basis, for further adapters; `convert.migrate_task` carries the old one's tasks over.

    By default the new U and V begin with the old ones, bit for bit, and go on with directions orthogonal to them: the
    leading ones of what the old basis leaves of the new adapters' updates (HOSVD, then JD-Full's alternations with the
    old directions held). Tasks then
    lose nothing: their cores are padded with zeros. With `k` both are fitted anew within k directions, for the old
    sources' stored cores, the tasks' `cores` and the new adapters alike: the basis stays small, and tasks drift.

    The mean core M stays the one that the old basis's tasks use (with `k`: its projection), as do direction tensors G
    and the spectra, which are those of the first version's fleet. Stored source cores are joined by the new sources',
    of which an old source's say what the old basis kept of it. Modules that no new adapter changes stay as they are.

    Args:
        basis: a basis, its folder or its Hub id.
        sources: the new adapters, as in `build_basis`. One that is in the basis already (by sha256) is a bad source.
        add: at most so many new directions per side and module, or the share of the new adapters' energy in (0, 1)
            that old and new directions have to keep together in every module.
        add_in: on the input side, where that differs.
        k, k_in: instead of growing, fit so many directions anew.
        cores: with `k`: per task of the old basis its module → core (k_out, k_in) in units of ΔW, such as
            ``read_task(task).cores``. Each counts as much as a new adapter.
        max_drift: with `k`: refuse a basis in which a stored source's core or one of `cores` loses more than this
            share of its norm in a module.
        weights, alternations, skip_bad, partial, allow_bin, base_model, max_memory, work_folder, token, progress: as
            in `build_basis`. New adapters that leave modules of the basis alone need no `partial`.

    Returns:
        A basis in memory. Its ``info`` has ``version``, ``lineage`` (the fingerprints it came from) and ``update``:
        the arguments, and per module how many directions were added and what the old and the new basis keep of the new
        adapters. ``measured`` is of the new adapters.

    Raises:
        SourceError: bad sources; lists all of them.
        SubspaceError: arguments that clash; too little memory; more drift than `max_drift`; nothing says what `k` has
            to keep.
        OSError: the disk refuses what is to be kept in `work_folder`.
    """
    _check(add, add_in, k, k_in, weights, max_drift)
    memory = parse_size(max_memory)
    old = basis if isinstance(basis, SubspaceBasis) else SubspaceBasis.from_pretrained(basis, token=token)
    known = old.info.get("sources") or []
    fleet = gather(
        sources,
        skip_bad=skip_bad,
        partial=partial,
        token=token,
        progress=progress,
        allow_bin=allow_bin,
        base_model=base_model,
        judge=lambda source: _misfit(source, old),
        taken=[str(entry.get("name")) for entry in known],
    )
    names = {str(old.find(name)): name for name in fleet.modules}
    changed = {
        key: name
        for key, name in names.items()
        if any(name in source.keys and source.norms[name] > 0 for source in fleet.sources)
    }
    fleet = replace(fleet, modules=list(changed.values()))
    shapes = old.shapes()
    most = max(max(shapes[key]["k_out"], shapes[key]["k_in"]) for key in changed)
    more = GUESSED_K if isinstance(add, float) else max(add, add_in or 0)
    plan = MemoryPlan(fleet, "adapters", max(most + more, k or 0, k_in or 0), None, weights, memory)
    protected = [_by_basis_name(old, each) for each in cores]
    wanted = None if k is None else (k, k_in or k)
    arguments = {
        "add": add,
        "add_in": add_in,
        "k": k,
        "k_in": k_in,
        "tasks": len(protected),
        "max_drift": max_drift,
        "weights": weights,
        "alternations": alternations,
        "partial": partial,
        "allow_bin": allow_bin,
    }
    kept = None
    if work_folder is not None:
        held_too = [{key: tensor_sha256(core) for key, core in each.items()} for each in protected]
        # how much drift is allowed changes no module: after a refusal a larger bound goes on from what is there
        made_with = {**arguments, "max_drift": None, "update of": old.fingerprint, "cores": held_too}
        kept = WorkFolder(Path(work_folder), fleet.sources, made_with)
    by_name = {name: key for key, name in changed.items()}
    # what an interrupted update finished is not read again
    done = {
        by_name[name]: found for name in fleet.modules if kept is not None and (found := kept.get(name)) is not None
    }
    reader = Reader(fleet.sources, plan.held)
    bar = tqdm(total=len(changed), initial=len(done), desc="updating", unit="module", delay=2, disable=not progress)
    with bar:
        for group in reader.groups([name for name in fleet.modules if by_name[name] not in done]):
            reader.hold(group)
            for name in group:
                key = by_name[name]
                held = OldModule(
                    key,
                    _checked(key, old[key], len(known)),
                    source_weights_of(known),
                    [each[key] for each in protected if key in each],
                )
                done[key] = update_module(plan, reader, name, held, add, add_in, wanted, alternations)
                if kept is not None:
                    kept.put(name, *done[key])
                bar.update()
    # in one order, wherever they come from
    modules = {key: done[key][0] for key in changed}
    facts = {key: dict(done[key][1]) for key in changed}
    drifts = {key: each.pop("drift") for key, each in facts.items()}
    squares = [each.pop("squares") for each in facts.values()]
    worst = max(drifts, key=drifts.__getitem__)
    if max_drift is not None and drifts[worst] > max_drift:
        raise SubspaceError(
            f"Within k={k} module {worst!r} would lose {drifts[worst]:.3g} of the norm of what the old basis holds,"
            f" more than max_drift={max_drift:g}. Give a larger k, or grow with add= instead, which loses nothing."
        )
    untouched = {
        key: _with_absent(_checked(key, old[key], len(known)), len(fleet.sources)) for key in old if key not in modules
    }
    everything = {key: modules.get(key) or untouched[key] for key in old}
    info = record(old, fleet, names, arguments, everything, facts, drifts if k is not None else {})
    if k is not None:
        info["sources"][: len(known)] = [after_refit(entry, i, squares) for i, entry in enumerate(known)]
    return SubspaceBasis(everything, info)


def _checked(name: str, module: ModuleBasis, sources: int) -> ModuleBasis:
    if module.cores is not None and len(module.cores) != sources:
        raise SubspaceError(
            f"Module {name!r} of the basis holds {len(module.cores)} sources' cores, and its config lists {sources}"
            " sources. The two do not belong together: fetch or build the basis again."
        )
    return module


def _with_absent(module: ModuleBasis, count: int) -> ModuleBasis:
    """A module that no new source changes: of those its stored cores are zero."""
    if module.cores is None:
        return module
    return replace(module, cores=torch.cat([module.cores, module.cores.new_zeros(count, module.k_out, module.k_in)]))


def _misfit(source: Source, basis: SubspaceBasis) -> str | None:
    for entry in basis.info.get("sources") or []:
        if entry.get("sha256") == source.sha256:
            return f"it is in the basis already, as {entry.get('name')!r} (the same sha256). Leave it out."
    if not same_model(source.base_model, basis.base_model):
        return (
            f"trained on {source.base_model!r}, but the basis is for {basis.base_model!r}. Use adapters of that base"
            " model."
        )
    shapes = basis.shapes()
    for name in source.keys:
        key = basis.find(name)
        if key is None:
            return (
                f"it adapts {name!r}, which the basis does not have. Build a basis of its own for such adapters, or"
                " leave it out."
            )
        if source.shape(name)[:2] != (shapes[key]["out"], shapes[key]["in"]):
            return (
                f"module {name!r} is {source.shape(name)[:2]}, in the basis {(shapes[key]['out'], shapes[key]['in'])}."
                " It belongs to another base model."
            )
    return None


def _by_basis_name(basis: SubspaceBasis, cores: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    shapes, found = basis.shapes(), {}
    for name, core in cores.items():
        key = basis.find(name)
        size = None if key is None else (shapes[key]["k_out"], shapes[key]["k_in"])
        if key is None or size is None or any(n > m for n, m in zip(core.shape, size, strict=True)):
            raise SubspaceError(
                f"cores: module {name!r} has a core {tuple(core.shape)}, the basis {size or 'no such module'}. Give"
                " cores of tasks on this very basis."
            )
        # a task that uses the leading directions only
        padded = torch.zeros(size, dtype=torch.float64)
        padded[: core.shape[0], : core.shape[1]] = core
        found[key] = padded
    return found


def _check(
    add: int | float, add_in: int | None, k: int | None, k_in: int | None, weights: str, max_drift: float | None
) -> None:
    if weights not in WEIGHTS:
        raise SubspaceError(f"There is no weighting {weights!r}; choose one of {', '.join(WEIGHTS)}.")
    if isinstance(add, bool) or (isinstance(add, float) and not 0 < add < 1) or (isinstance(add, int) and add < 1):
        raise SubspaceError(
            f"add={add!r}: give a number of new directions (1, 2, …) or a share of energy to keep (0.5)."
        )
    if add_in is not None and (add_in < 0 or isinstance(add, float)):
        raise SubspaceError(
            f"add_in={add_in}: give 0 or more, and a number for add; a share decides both sides itself."
        )
    for name, value in (("k", k), ("k_in", k_in)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise SubspaceError(f"{name}={value!r}: give a number of directions, at least 1.")
    if k is None and (k_in is not None or max_drift is not None):
        raise SubspaceError(
            "k_in and max_drift are for a basis that is fitted anew: give k as well. Growing loses nothing."
        )
    if max_drift is not None and not max_drift >= 0:
        raise SubspaceError(f"max_drift={max_drift}: give 0 or more, as a share of ‖ΔW‖.")
