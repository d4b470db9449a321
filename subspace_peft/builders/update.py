"""`update_basis`: a new version of a basis, grown by what new adapters need and tasks on the old one do not lose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._io.progress import progress_bar
from ..base_names import REMEDY, difference, is_of, said_of_basis
from ..basis import ModuleBasis, SubspaceBasis
from ..basis.lineage import earlier_versions, warn_float32
from ..basis.module import tensor_sha256
from ..basis.transfer import Own
from ..errors import SubspaceError
from ..sources.source import Source
from .absorb import is_on, own_parts
from .base_model import base_model_name, check_weights, keep_weights
from .fleet import Fleet, gather
from .ignored import fewer_directions, warn_of_few_added, warn_of_fewer, warn_of_ignored_in_update
from .keywords import takes_options
from .memory import GUESSED_K, MemoryPlan
from .options import Resources, UpdateOptions
from .reader import Reader
from .resume import WorkFolder
from .task_cores import by_basis_name
from .update_module import OldModule, update_module
from .update_record import after_refit, record, source_weights_of

Updated = dict[str, tuple[ModuleBasis, dict[str, Any]]]  # by the module's name in the basis


@dataclass(frozen=True, eq=False)
class PreparedUpdate:
    """An update that can begin.

    Attributes:
        old: the basis to update.
        options: as given.
        resources: as given.
        fleet: the new adapters, opened and checked, with the modules that they change.
        names: module of the basis → its name in the fleet, of all modules that the new adapters have.
        changed: the same, of those modules only that an update is not zero in.
        plan: how each module is built within the memory.
        tasks: per task of the old basis, module of the basis → core (k_out, k_in), float64.
        absorbed: per source that is a task on the old basis, by its place in the fleet: module of the fleet → ``(B,
            A)`` of its own directions.
        kept: the folder of finished modules, or None.
        base_model: the base model's name, where it is known.
    """

    old: SubspaceBasis
    options: UpdateOptions
    resources: Resources
    fleet: Fleet
    names: dict[str, str]
    changed: dict[str, str]
    plan: MemoryPlan
    tasks: list[dict[str, torch.Tensor]]
    absorbed: dict[int, dict[str, Own]]
    kept: WorkFolder | None
    base_model: str | None

    @property
    def sources_before(self) -> list[dict[str, Any]]:
        """The entries of the old basis's sources."""
        return self.old.info.get("sources") or []

    def growth(self, name: str) -> tuple[int | float, int | None, tuple[int, int] | None]:
        """Return ``add``, ``add_in`` and the bound on tasks' own directions in a module of the fleet.

        What a task on the old basis needs is what its own directions need; `add` is for all other sources.
        """
        options, bound = self.options, None
        if options.bounded and not isinstance(options.growth, float):
            bound = options.growth, options.growth if options.add_in is None else options.add_in
        others = any(
            name in source.keys and i not in self.absorbed and source.norms[name] > 0
            for i, source in enumerate(self.fleet.sources)
        )
        return (options.growth, options.add_in, bound) if others else (0, 0, bound)

    def module(self, key: str) -> ModuleBasis:
        """Return a module of the old basis.

        Raises:
            SubspaceError: it holds more or fewer sources' cores than the basis lists sources.
        """
        module, count = self.old[key], len(self.sources_before)
        if module.cores is not None and len(module.cores) != count:
            raise SubspaceError(
                f"Module {key!r} of the basis holds {len(module.cores)} sources' cores, and its config lists {count}"
                " sources. The two do not belong together: fetch or build the basis again."
            )
        return module


@takes_options(options=UpdateOptions, resources=Resources)
def update_basis(
    basis: SubspaceBasis | str | Path,
    sources: Iterable[Any],
    *,
    options: UpdateOptions,
    resources: Resources,
    cores: Iterable[Mapping[str, torch.Tensor]] = (),
    base_model: nn.Module | None = None,
) -> SubspaceBasis:
    """Return a new version of a basis, for further adapters; `convert.migrate_task` carries the old one's tasks over.

    By default the new U and V begin with the old ones, bit for bit, and go on with directions orthogonal to them: the
    leading ones of the part of the new adapters' updates that the old basis leaves (HOSVD, then JD-Full's alternations
    with the old directions held). Tasks then lose nothing: their cores are padded with zeros. With `k` both are fitted
    from scratch within k directions, for the old sources' stored cores, the tasks' `cores` and the new adapters alike:
    the basis stays small, and tasks drift.

    A task on this very basis among the sources (or on an earlier version that it begins with) is absorbed: the basis
    grows by the directions of its own that it trained with `extra_rank`, as far as they lie outside, at most so many
    per side and none where they lie inside; tasks share them. `migrate_task` then makes it a plain core, exactly.
    Neither `add`'s default nor the core counts for that; an `add` that is given bounds them too, and cuts off the
    weakest. A share of energy, or `k`, takes such a task as any other adapter.

    The mean core M stays the one that the old basis's tasks use (with `k`: its projection), as do direction tensors G
    and the spectra, which are those of the first version's fleet. Stored source cores are joined by the new sources',
    of which an old source's say how much the old basis kept of it. Modules that no new adapter changes stay as they
    are.

    Args:
        basis: a basis, its folder or its Hub id.
        sources: the new adapters, as in `build_basis`, and tasks in a basis: folder, Hub id, live PeftModel or
            `SavedTask`. One that is in the basis already (by sha256, a task on the same directions) is a bad
            source.
        options: how to update; its fields are keywords of their own, too.
        resources: as in `build_basis`; its fields are keywords of their own, too.
        cores: with `k`: per task of the old basis its module → core (k_out, k_in) in units of ΔW, such as
            ``read_task(task).cores``. Each counts as much as a new adapter.
        base_model: as in `build_basis`.

    Returns:
        A basis in memory. Its ``info`` has ``version``, ``lineage`` (the fingerprints it came from) and ``update``:
        the arguments, and per module how many directions were added and how much the old and the new basis keep of the
        new adapters. ``measured`` is of the new adapters.

    Raises:
        SourceError: bad sources; lists all of them.
        SubspaceError: arguments that clash; too little memory; more drift than `max_drift`; nothing says what `k` has
            to keep.
        OSError: the disk refuses what is to be kept in `work_folder`.
    """
    update = prepare_update(basis, sources, options, resources, cores=cores, base_model=base_model)
    warn_float32(update.old)
    warn_of_ignored_in_update(options, cores=bool(update.tasks))
    new = _new_version(update, _update_modules(update))
    warn_of_fewer(new.info["update"].get("fewer_directions"), len(new))
    warn_of_few_added(update.options, update.old, new, absorbing=bool(update.absorbed))
    keep_weights(new, base_model)
    return new


def prepare_update(
    basis: SubspaceBasis | str | Path,
    sources: Iterable[Any],
    options: UpdateOptions,
    resources: Resources,
    *,
    cores: Iterable[Mapping[str, torch.Tensor]] = (),
    base_model: nn.Module | None = None,
) -> PreparedUpdate:
    """Read and check everything that an update is made from.

    Args:
        basis: as in `update_basis`.
        sources: as in `update_basis`.
        options: how to update; checked by themselves already.
        resources: what building may take.
        cores: as in `update_basis`.
        base_model: as in `update_basis`.

    Raises:
        SourceError: bad sources; lists all of them.
        SubspaceError: cores that are not of this basis; too little memory.
    """
    old = basis if isinstance(basis, SubspaceBasis) else SubspaceBasis.from_pretrained(basis, token=resources.token)
    name = base_model_name(said_of_basis(old.base_model, options.base_model_name), base_model)
    check_weights(old, base_model)
    fleet = gather(
        sources,
        skip_bad=options.skip_bad,
        partial=options.partial,
        token=resources.token,
        progress=resources.progress,
        allow_bin=options.allow_bin,
        base_model=base_model,
        base_model_name=options.base_model_name,
        judge=lambda source: _misfit(source, old),
        # what a task on the basis brings depends on no other source
        alone=lambda source: options.absorbs and own_parts(source, old) is not None,
        taken=[str(entry.get("name")) for entry in old.info.get("sources") or []],
    )
    names = {str(old.find(name)): name for name in fleet.modules}
    changed = {
        key: name
        for key, name in names.items()
        if any(name in source.keys and source.norms[name] > 0 for source in fleet.sources)
    }
    fleet = replace(fleet, modules=list(changed.values()))
    parts = [own_parts(source, old) for source in fleet.sources] if options.absorbs else []
    absorbed = {i: each for i, each in enumerate(parts) if each is not None}
    plan = MemoryPlan(
        fleet, "adapters", _most_directions(old, changed, options, absorbed), None, options.weights, resources.memory
    )
    tasks = [by_basis_name(old, each, "cores") for each in cores]
    kept = None
    if resources.work_folder is not None:
        hashes = [{key: tensor_sha256(core) for key, core in each.items()} for each in tasks]
        # the drift that is allowed changes no module: after a refusal a larger bound goes on from the finished ones
        arguments = {**options.record(len(tasks)), "max_drift": None}
        kept = WorkFolder(
            Path(resources.work_folder), fleet.sources, {**arguments, "update of": old.fingerprint, "cores": hashes}
        )
    return PreparedUpdate(old, options, resources, fleet, names, changed, plan, tasks, absorbed, kept, name)


def _most_directions(
    old: SubspaceBasis,
    changed: Mapping[str, str],
    options: UpdateOptions,
    absorbed: Mapping[int, Mapping[str, Own]],
) -> int:
    """Return the most directions that a side of a changed module may get."""
    shapes = old.shapes()
    before = max(max(shapes[key]["k_out"], shapes[key]["k_in"]) for key in changed)
    more = GUESSED_K if isinstance(options.growth, float) else max(options.growth, options.add_in or 0)
    own = max(sum(each[name][0].shape[1] for each in absorbed.values() if name in each) for name in changed.values())
    return max(before + more + own, *(options.refit or (0, 0)))


def _update_modules(update: PreparedUpdate) -> Updated:
    """Update the modules that new adapters change; those that an interrupted update finished are not read again."""
    kept, fleet, options = update.kept, update.fleet, update.options
    keys = {name: key for key, name in update.changed.items()}
    done: Updated = {
        keys[name]: found for name in fleet.modules if kept is not None and (found := kept.get(name)) is not None
    }
    counts = source_weights_of(update.sources_before)
    reader = Reader(fleet.sources, update.plan.held)
    hidden = not update.resources.progress
    with progress_bar(total=len(keys), initial=len(done), desc="updating", unit="module", shown=not hidden) as bar:
        for group in reader.groups([name for name in fleet.modules if keys[name] not in done]):
            reader.hold(group)
            for name in group:
                key = keys[name]
                cores = [each[key] for each in update.tasks if key in each]
                own = [each[name] for each in update.absorbed.values() if name in each]
                old = OldModule(key, update.module(key), counts, cores, own=own)
                growth = update.growth(name)
                done[key] = update_module(update.plan, reader, name, old, *growth, options.refit, options.alternations)
                if kept is not None:
                    kept.put(name, *done[key])
                bar.update()
    # in one order, wherever they come from
    return {key: done[key] for key in update.changed}


def _new_version(update: PreparedUpdate, done: Updated) -> SubspaceBasis:
    """Put updated and untouched modules together, with the record of the update.

    Raises:
        SubspaceError: more drift than `max_drift`.
    """
    old, options, known = update.old, update.options, update.sources_before
    facts = {key: dict(each) for key, (_, each) in done.items()}
    drifts = {key: each.pop("drift") for key, each in facts.items()}
    squares = [each.pop("squares") for each in facts.values()]
    _check_drift(drifts, options)
    more = len(update.fleet.sources)
    modules = {key: done[key][0] if key in done else _with_absent(update.module(key), more) for key in old}
    refitted = options.refit is not None
    arguments = options.record(len(update.tasks))
    info = record(old, update.fleet, update.names, arguments, modules, facts, drifts if refitted else {})
    info["base_model_name_or_path"] = update.base_model
    if update.absorbed:
        tasks = [update.fleet.sources[i] for i in update.absorbed]
        info["update"]["absorbed"] = [{"name": task.name, "sha256": task.sha256} for task in tasks]
    if refitted:
        if short := fewer_directions({key: modules[key] for key in done}, options):
            info["update"]["fewer_directions"] = short
        info["sources"][: len(known)] = [after_refit(entry, i, squares) for i, entry in enumerate(known)]
    return SubspaceBasis(modules, info)


def _check_drift(drifts: Mapping[str, float], options: UpdateOptions) -> None:
    worst = max(drifts, key=drifts.__getitem__)
    if options.max_drift is not None and drifts[worst] > options.max_drift:
        raise SubspaceError(
            f"Within k={options.k} module {worst!r} would lose {drifts[worst]:.3g} of the norm of what the old basis"
            f" holds, more than max_drift={options.max_drift:g}. Give a larger k, or grow with add= instead, which"
            " loses nothing."
        )


def _with_absent(module: ModuleBasis, count: int) -> ModuleBasis:
    """Return a module that no new source changes: its stored cores of the new sources are zero."""
    if module.cores is None:
        return module
    return replace(module, cores=torch.cat([module.cores, module.cores.new_zeros(count, module.k_out, module.k_in)]))


def _is_entry(source: Source, entry: Mapping[str, Any], basis: SubspaceBasis) -> bool:
    """Return whether a source is the one of an entry: the same bytes and, of a task, on the same directions."""
    if entry.get("sha256") != source.sha256:
        return False
    if source.task is None or entry.get("task_on") == source.task_on:
        return True
    # moved on as it was, from one version of the basis to another
    return entry.get("task_on") in (basis.fingerprint, *earlier_versions(basis)) and is_on(source.task, basis)


def _misfit(source: Source, basis: SubspaceBasis) -> str | None:
    """Return why a source cannot update the basis, or None."""
    for entry in basis.info.get("sources") or []:
        if _is_entry(source, entry, basis):
            return f"it is in the basis already, as {entry.get('name')!r} (the same sha256). Leave it out."
    # a name that the user says is held against the basis's own before
    if source.said_base is None and not is_of(source.base_model, basis.info):
        said, own = str(source.base_model), str(basis.base_model)
        return f"trained on {said!r}, but the basis is for {own!r}: {difference(said, own)}. {REMEDY}"
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
