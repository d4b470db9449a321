"""A fleet in a shared basis: cores, with own directions or without, by this package's functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from subspace_peft import SubspaceBasis, build_basis, build_clusters, project_lora
from subspace_peft.basis import ModuleBasis
from subspace_peft.basis.layout import SCALES, SIDES
from subspace_peft.basis.precision import restored
from subspace_peft.convert.projection import Projection

from .members import Fleet
from .storing import Stored, Tensors, Updates, restore, store

MOST = 8  # own directions per module that are tried to hold so much of the energy


def cores(fleet: Fleet, *, basis: str, core: str, **build: Any) -> Stored:
    """Store a basis of the fleet in the precision `basis`, and a core of kind `core` per adapter.

    Args:
        fleet: the fleet.
        basis: of `SubspaceBasis.to_precision`.
        core: one of `storing.KINDS`, of cores and own directions.
        **build: of `build_basis`.
    """
    return _on(fleet, [_built(fleet, basis, build)], core, lambda folder, on: project_lora(folder, on))


def with_own(fleet: Fleet, *, basis: str, core: str, own: int, **build: Any) -> Stored:
    """Store `own` directions per module of each adapter's own as well, put where they keep most."""

    def project(folder: str, on: SubspaceBasis) -> Projection:
        budget = own * sum(each["out"] + each["in"] for each in on.shapes().values())
        return project_lora(folder, on, extra_budget=budget)

    return _on(fleet, [_built(fleet, basis, build)], core, project)


def to_energy(fleet: Fleet, *, basis: str, core: str, energy: float, **build: Any) -> Stored:
    """Store as few own directions per module as hold, with the core, the share `energy` of the adapter."""

    def project(folder: str, on: SubspaceBasis) -> Projection:
        found = project_lora(folder, on)
        for own in range(1, MOST + 1):
            if found.energy_with_own >= energy:
                break
            found = project_lora(folder, on, extra_rank=own)
        return found

    return _on(fleet, [_built(fleet, basis, build)], core, project)


def clustered(fleet: Fleet, *, basis: str, core: str, clusters: int, **build: Any) -> Stored:
    """Store so many bases at most, each of the adapters that it keeps most of, and a core per adapter."""
    made = build_clusters(fleet.folders, clusters, progress=False, leave_one_out=False, keep_cores=False, **build)
    places = {each["location"]: each["cluster"] for each in made.sources}
    which = [places[folder] for folder in fleet.folders]
    bases = [each.to_precision(basis) for each in made.bases]
    return _on(fleet, bases, core, lambda folder, on: project_lora(folder, on), which)


def given(fleet: Fleet, *, basis: str, core: str) -> Stored:
    """Store the cores that a fleet has which was trained in one basis, and the basis unless a seed makes it again.

    Raises:
        ValueError: the fleet was not trained in a basis.
    """
    if fleet.given is None:
        raise ValueError("This fleet was not trained in a basis: there is none to store it in.")
    on = fleet.given if fleet.generated else fleet.given.to_precision(basis)
    return _on(fleet, [on], core, lambda folder, on: project_lora(folder, on), free=fleet.generated)


def _built(fleet: Fleet, precision: str, build: dict[str, Any]) -> SubspaceBasis:
    """Return the fleet's basis, or the control of as many random directions, in a precision."""
    if build.get("builder") != "random":
        return fleet.basis(**build).to_precision(precision)
    like = fleet.basis(**{key: value for key, value in build.items() if key not in ("builder", "seed")})
    random = build_basis(like=like, builder="random", seed=build.get("seed", 0), progress=False)
    return random.to_precision(precision)


def _on(
    fleet: Fleet,
    bases: Sequence[SubspaceBasis],
    core: str,
    project: Callable[[str, SubspaceBasis], Projection],
    which: Sequence[int] | None = None,
    *,
    free: bool = False,
) -> Stored:
    """Store every adapter on one of `bases`.

    Args:
        fleet: the fleet.
        bases: what they are projected on.
        core: the kind of number of cores and own directions.
        project: makes the projection of a folder on a basis.
        which: per adapter the place of its basis, one byte each; None where there is only one.
        free: whether the basis takes no bytes, since a seed makes it again.
    """
    directions = {f"{n}/{key}": each for n, basis in enumerate(bases) for key, each in _directions(basis).items()}
    precisions = [basis.precision or "float32" for basis in bases]
    tasks: dict[str, Tensors] = {}
    own = 0
    for place, (name, folder) in enumerate(zip(fleet.names, fleet.folders, strict=True)):
        n = 0 if which is None else which[place]
        projection = project(folder, bases[n])
        tensors: Tensors = {} if which is None else {"basis": torch.tensor(n, dtype=torch.uint8)}
        for module, at in projection.places.items():
            tensors |= store(f"{module}.core", projection.cores[at], core)
            if at in projection.own:
                B, A = projection.own[at]
                own += len(A)
                tensors |= store(f"{module}.B", B.T, core) | store(f"{module}.A", A, core)
        tasks[name] = tensors

    def read(shared: Tensors, task: Tensors) -> Updates:
        n = int(task.get("basis", 0))
        return _updates(f"{n}/", directions if free else shared, precisions[n], task)

    modules = sum(len(basis) for basis in bases) / len(bases)
    facts = {"own": round(own / len(tasks) / modules, 3), "bases": len(bases)}
    return Stored({} if free else directions, tasks, read, facts)


def _directions(basis: SubspaceBasis) -> Tensors:
    """Return U and V of all modules as they are stored, with their scales where they have some."""
    found: Tensors = {}
    for name in basis:
        held = basis.stored(name)
        found |= {f"{name}.{key}": held[key] for key in (*SIDES, *SCALES.values()) if key in held}
    return found


def _updates(where: str, directions: Tensors, precision: str, task: Tensors) -> Updates:
    found = {}
    for module in [key.removesuffix(".core") for key in task if key.endswith(".core")]:
        stored = {
            key: directions[f"{where}{module}.{key}"]
            for key in (*SIDES, *SCALES.values())
            if f"{where}{module}.{key}" in directions
        }
        on = ModuleBasis(**stored) if precision == "float32" else restored(stored, precision, module)
        update = on.U @ restore(task, f"{module}.core") @ on.V
        if f"{module}.B" in task:
            update = update + restore(task, f"{module}.B").T @ restore(task, f"{module}.A")
        found[module] = update
    return found
