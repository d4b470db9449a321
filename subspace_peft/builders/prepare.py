"""All that is checked before a basis is built. A dry run stops here, so it refuses whatever a build refuses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..basis import SubspaceBasis
from ..errors import SubspaceError
from .base_model import base_model_name, model_name
from .budget import check_budget, largest
from .complete import filling_weights
from .controls import Sizes, linear_weights, weight_for
from .distributed import ALONE, ProcessGroup
from .fleet import Fleet, gather
from .k_pattern import sizes_by_pattern
from .left_out import wanted
from .memory import CORES_KEPT_UP_TO, MemoryPlan
from .options import BuildOptions, Resources
from .resume import WorkFolder
from .weights import of_usable, read_weights, weighted


@dataclass(frozen=True, eq=False)
class FleetBuild:
    """A build from a fleet of sources that can begin.

    Attributes:
        options: as given, with the weights read from their file.
        resources: as given.
        fleet: the sources, opened and checked.
        plan: how each module is built within the memory.
        keep_cores: whether the sources' own cores are stored.
        leave_one_out: whether to measure how much a basis built without a source keeps of it.
        filling: the base weights by module that an incomplete basis is filled up from, where that is asked for.
        kept: the folder of finished modules, or None.
        base_model: the base model's name, where it is known.
        model: the base model, where it is at hand.
    """

    options: BuildOptions
    resources: Resources
    fleet: Fleet
    plan: MemoryPlan
    keep_cores: bool
    leave_one_out: bool
    filling: dict[str, torch.Tensor] | None
    kept: WorkFolder | None
    base_model: str | None
    model: nn.Module | None


@dataclass(frozen=True, eq=False)
class ControlBuild:
    """A build of a control, `random` or `base-weights`, that can begin.

    Attributes:
        options: as given.
        resources: as given.
        sizes: per module out, in, k_out, k_in.
        weights: per module its base weight (out, in); none for `random`.
        base_model: the base model's name, where it is known.
        fleet: the sources that the sizes are from, where they are.
        model: the base model, where it is at hand.
    """

    options: BuildOptions
    resources: Resources
    sizes: dict[str, Sizes]
    weights: dict[str, torch.Tensor]
    base_model: str | None
    fleet: Fleet | None
    model: nn.Module | None


def prepare(
    sources: Iterable[Any] | None,
    options: BuildOptions,
    resources: Resources,
    *,
    like: SubspaceBasis | str | Path | None = None,
    base_model: nn.Module | None = None,
    processes: ProcessGroup = ALONE,
) -> FleetBuild | ControlBuild:
    """Read and check everything that a build is made from.

    Args:
        sources: the fleet, as `build_basis` takes it.
        options: what decides the basis; checked by themselves already.
        resources: what building may take.
        like: a basis, or its place, whose modules and sizes `random` takes over.
        base_model: the base model, where it is needed.
        processes: those that build together.

    Raises:
        SourceError: bad sources; lists all of them.
        SubspaceError: options that clash with the sources or with the base model; too little memory.
    """
    options.check_inputs(sources=sources, base_model=base_model)
    kind, by_source = read_weights(options.weights)
    options = replace(options, weights=by_source or kind)
    if options.controls:
        if isinstance(like, (str, Path)):
            like = SubspaceBasis.from_pretrained(like, token=resources.token)
        return _prepare_control(sources, options, resources, like, base_model)
    fleet = gather(
        sources,
        skip_bad=options.skip_bad,
        partial=options.partial,
        token=resources.token,
        progress=resources.progress,
        allow_bin=options.allow_bin,
        base_model=base_model,
        base_model_name=options.base_model_name,
        processes=processes,
    )
    if by_source and fleet.skipped:
        by_source = of_usable(fleet, by_source)
        # on record as well: a rebuild has only the usable sources
        options = replace(options, weights=by_source or kind)
    if by_source:
        fleet = weighted(fleet, by_source)
    return _prepare_fleet(fleet, kind, options, resources, base_model)


def _prepare_fleet(
    fleet: Fleet, kind: str, options: BuildOptions, resources: Resources, base_model: nn.Module | None
) -> FleetBuild:
    k, k_in = options.size
    name = base_model_name(fleet.base_model, base_model)
    if options.budget is not None:
        check_budget(options.budget, len(fleet.modules))
        k = largest(options.budget, len(fleet.modules))
    keep_cores = len(fleet.sources) <= CORES_KEPT_UP_TO if options.keep_cores is None else options.keep_cores
    leave_one_out = options.builder == "adapters" and wanted(options.leave_one_out, fleet.groups)
    cores = (len(fleet.sources) if keep_cores else 0) + options.directions
    own = sizes_by_pattern(options.k_pattern, fleet.modules)
    plan = MemoryPlan(fleet, options.builder, k, k_in, kind, resources.memory, cores, own)
    filling = None
    if options.complete == "base-weights" and base_model is not None:
        filling = linear_weights(base_model, "all-linear")
        filling_weights(filling, _short(plan, int(k), k_in or int(k)))
    kept = None
    if resources.work_folder is not None:
        # completing and measuring come after the modules are built
        record = {**options.record(), "keep_cores": keep_cores, "leave_one_out": leave_one_out}
        record.pop("complete", None)
        kept = WorkFolder(Path(resources.work_folder), fleet.sources, record)
    return FleetBuild(options, resources, fleet, plan, keep_cores, leave_one_out, filling, kept, name, base_model)


def _short(plan: MemoryPlan, k: int, k_in: int) -> dict[str, tuple[int, int]]:
    """Return the modules, with (out, in), whose sources cannot span k directions."""
    found = {}
    for name in plan.fleet.modules:
        task = plan.module(name)
        out, inner = task.shape
        if sum(task.ranks) < max(min(k, out), min(k_in, inner)):
            found[name] = (out, inner)
    return found


def _prepare_control(
    sources: Iterable[Any] | None,
    options: BuildOptions,
    resources: Resources,
    like: SubspaceBasis | None,
    base_model: nn.Module | None,
) -> ControlBuild:
    """Find the modules and sizes of a control: those of `like`, of the base model, or of the sources.

    Raises:
        SubspaceError: nothing says which modules; or `base-weights` without a base model.
    """
    k, k_in = int(options.size[0]), options.size[1] or int(options.size[0])
    weights = linear_weights(base_model, options.target_modules) if base_model is not None else {}
    sizes: dict[str, Sizes] = {}
    name = model_name(base_model)
    fleet = None
    if like is not None:
        sizes = {key: (each["out"], each["in"], each["k_out"], each["k_in"]) for key, each in like.shapes().items()}
        name = like.base_model or name
    elif weights:
        sizes = {key: (*weight.shape, k, k_in) for key, weight in weights.items()}
    elif sources is not None:
        fleet = gather(
            sources,
            skip_bad=options.skip_bad,
            partial=True,
            token=resources.token,
            progress=resources.progress,
            allow_bin=options.allow_bin,
            base_model_name=options.base_model_name,
            keep_duplicates=True,
        )
        name = fleet.base_model
        sizes = {key: (*source.shape(key)[:2], k, k_in) for source in fleet.sources for key in source.keys}
    if not sizes:
        raise SubspaceError(
            f"The builder {options.builder!r} has to know which modules: pass sources, or like=basis (--like), or"
            " base_model= (--base-model) with target_modules= (--target-modules)."
        )
    if like is None:
        own = sizes_by_pattern(options.k_pattern, sizes)
        sizes = {key: (*each[:2], *((own[key],) * 2 if key in own else each[2:])) for key, each in sizes.items()}
    found = {}
    if options.builder == "base-weights":
        found = {key: weight_for(key, weights, each[:2]) for key, each in sizes.items()}
    name = base_model_name(options.base_model_name, base_model) or name
    return ControlBuild(options, resources, sizes, found, name, fleet, base_model)
