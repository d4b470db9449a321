"""Fit a basis again within fewer directions, for the tasks on it: what each would lose is known beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._io.untrusted import is_finite
from .._shown import Shown, Table, fingerprint
from ..basis import ModuleBasis, SubspaceBasis
from ..basis.lineage import next_version, warn_float32
from ..energy import sources_of
from ..errors import SubspaceError
from .extend import frame, nothing_beside, refit
from .option_checks import whole_number
from .options import UpdateOptions
from .task_cores import TaskCores
from .update_module import OldModule, joined_module, with_old
from .update_record import after_refit, source_weights_of

Squares = list[tuple[float, float]]


@dataclass(frozen=True, eq=False, repr=False)
class RefitPlan(Shown):
    """A basis of fewer directions, and what each task would lose on it. Nothing is written.

    Attributes:
        basis: The basis as it is.
        k: Directions that every module is to have at most, on the output and the input side.
        modules: The modules that are fitted again, by their names in the basis; all others stay bit for bit.
        drift: Task → module, as the task calls it → the bound ``‖C − T_u T_uᵀ C T_v T_vᵀ‖_F / ‖ΔW‖_F`` on what
            migrating it changes, C being its core and T_u (k_out, k) and T_v (k_in, k) the new directions in
            coordinates of the old ones. 0 in modules that stay.
        arguments: What the record of the new basis says of it.
        squares: Module → per source of the basis its stored core's squared norm before and after.
    """

    basis: SubspaceBasis
    k: tuple[int, int]
    modules: Mapping[str, ModuleBasis]
    drift: Mapping[str, Mapping[str, float]]
    arguments: Mapping[str, Any]
    squares: Mapping[str, Squares]

    @property
    def worst(self) -> tuple[str, str, float]:
        """The task and module that would change most, and by how much."""
        return max(((t, m, x) for t, each in self.drift.items() for m, x in each.items()), key=lambda found: found[2])

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Module of the basis → the (k_out, k_in) that it would have."""
        new = {name: (module.k_out, module.k_in) for name, module in self.modules.items()}
        return {name: new.get(name, (s["k_out"], s["k_in"])) for name, s in self.basis.shapes().items()}

    def _shown_facts(self) -> Iterator[tuple[str, Any]]:
        task, module, drift = self.worst
        yield "k", f"{self.k[0]} out, {self.k[1]} in" if self.k[0] != self.k[1] else self.k[0]
        yield "modules fitted again", f"{len(self.modules)} of {len(self.basis)}"
        yield "tasks", len(self.drift)
        yield "largest drift", f"{drift:.2g} ({task}, {module})"
        yield "basis", fingerprint(self.basis.fingerprint)

    def _shown_table(self) -> Table:
        rows = ((name, f"{max(each.values()):.2g}") for name, each in self.drift.items())
        return ("task", "largest drift of a module"), rows, len(self.drift)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan without tensors, as JSON values."""
        return {
            "from": self.basis.fingerprint,
            "k": list(self.k),
            "modules": {name: list(size) for name, size in self.sizes.items()},
            "drift": {name: dict(each) for name, each in self.drift.items()},
        }


def plan_refit(
    basis: SubspaceBasis | str | Path,
    tasks: Mapping[str, Any],
    k: int | tuple[int, int],
    *,
    weights: Mapping[str, float] | None = None,
    sources: bool = False,
    alternations: int = 10,
) -> RefitPlan:
    """Fit at most `k` directions per side and module to the tasks on a basis, and say what each would lose.

    The new directions are those in which the tasks' cores have most energy, each task's update counting as of norm 1:
    the leading eigenvectors of ``Σ w_i² C_i C_iᵀ`` and of ``Σ w_i² C_iᵀ C_i``, ``w_i = 1/‖ΔW_i‖``, alternated as
    JD-Full does (arXiv 2407.00066). That minimises a module's ``Σ drift_i²``, of the drifts that the plan says, up to
    local optima. It is what `update_basis` does with ``k=`` and ``cores=``, without new adapters. Modules that have no
    more than `k` stay bit for bit, those that no task uses keep their leading directions, and where the tasks span
    fewer directions there are fewer.

    Args:
        basis: The basis, its folder or its Hub id.
        tasks: Name → task on this very basis, as `read_task` takes it, or its cores: module → (k_out, k_in), in units
            of ΔW. Tasks that use the leading directions only count as padded with zeros. Own directions stay as they
            are, beside the new basis.
        k: Directions per side, or (output, input).
        weights: Task → how much its squared drift counts; 1 by default.
        sources: Fit to the stored cores of the basis's sources as well, each as to a task.
        alternations: At most this many rounds.

    Raises:
        SubspaceError: No task, a task on another basis, values that are not finite, or sizes and weights that are
            none.
    """
    old = basis if isinstance(basis, SubspaceBasis) else SubspaceBasis.from_pretrained(basis)
    size = _size(k)
    if not tasks:
        raise SubspaceError("There is no task to keep within fewer directions. Give at least one.")
    known = {name: TaskCores(name, task, old) for name, task in tasks.items()}
    counts = _weights(weights or {}, known)
    entries = sources_of(old.info)
    modules: dict[str, ModuleBasis] = {}
    squares: dict[str, Squares] = {}
    drift: dict[str, dict[str, float]] = {
        name: dict.fromkeys(task.names.values(), 0.0) for name, task in known.items()
    }
    for key, shape in old.shapes().items():
        users = {name: task for name, task in known.items() if task.alive(key)}
        if shape["k_out"] <= size[0] and shape["k_in"] <= size[1]:
            continue
        module = old[key]
        if not users:
            modules[key] = module.truncate(*size)
            squares |= _squares(key, module, modules[key])
            continue
        held = OldModule(
            key,
            module,
            source_weights_of(entries),
            [task.cores[key] for task in users.values()],
            # a core counts by the share of its task's update that it is: what is bounded is the loss of the whole
            [counts[name] * (float(t.cores[key].norm()) / t.norm(key, module)) ** 2 for name, t in users.items()],
            fit_sources=sources,
        )
        fixed = frame(module)
        pair = refit(with_old(nothing_beside(fixed), held), size, alternations)
        none = torch.zeros(0, pair.U.shape[1], pair.V.shape[0], dtype=torch.float64)
        modules[key], _ = joined_module(held, pair, none, torch.zeros(0, dtype=torch.float64), measure=False)
        squares |= _squares(key, module, modules[key])
        # float32's rounding of the new directions aside, these are orthonormal
        turns = [torch.linalg.qr(turn)[0] for turn in (pair.u, pair.v)]
        for name, task in users.items():
            drift[name][task.names[key]] = task.loss(key, module, *turns)
    k_in = None if size[0] == size[1] else size[1]
    arguments = UpdateOptions(k=size[0], k_in=k_in, alternations=alternations).record(len(known))
    return RefitPlan(old, size, modules, drift, arguments, squares)


def refit_basis(plan: RefitPlan, *, max_drift: float) -> SubspaceBasis:
    """Return the basis of a plan, in memory; `migrate_task` carries the tasks over.

    Args:
        plan: Of `plan_refit`.
        max_drift: Largest share of the norm of a task's ΔW that may change in a module, by the plan's bounds.

    Returns:
        The next version of the basis, with lineage and record as of an update with ``k=``. Where no module has more
        directions than asked for, it is the basis as it was.

    Raises:
        SubspaceError: A task would lose more than `max_drift`; names it and the module.
    """
    if not is_finite(max_drift) or max_drift < 0:
        raise SubspaceError(f"max_drift={max_drift}: give 0 or more, as a share of ‖ΔW‖.")
    task, module, drift = plan.worst
    if drift > max_drift:
        raise SubspaceError(
            f"Within k={plan.k[0] if plan.k[0] == plan.k[1] else plan.k} task {task!r} would lose {drift:.3g} of the"
            f" norm of its update in module {module!r}, more than max_drift={max_drift:g}. Give a larger k, or allow"
            " more with max_drift= (--max-drift)."
        )
    if not plan.modules:
        return plan.basis
    old = plan.basis
    warn_float32(old)
    modules = {name: plan.modules.get(name) or old[name] for name in old}
    info = next_version(old, modules, refitted=plan.modules)
    if "sources" in info:
        info["sources"] = [
            after_refit(entry, i, list(plan.squares.values())) if plan.squares else {**entry, "energy_kept": None}
            for i, entry in enumerate(info["sources"])
        ]
    before = old.shapes()
    info["update"] = {
        "arguments": {**plan.arguments, "max_drift": max_drift},
        "modules": {
            name: {"added": [new.k_out - before[name]["k_out"], new.k_in - before[name]["k_in"]]}
            for name, new in plan.modules.items()
        },
        "drift": {key: max(each.values()) for key, each in plan.drift.items()},
        "tasks": list(plan.drift),
    }
    return SubspaceBasis(modules, info)


def _squares(key: str, old: ModuleBasis, new: ModuleBasis) -> dict[str, Squares]:
    """Return the module's name with its stored cores' squared norms before and after; nothing where none is stored."""
    if old.cores is None or new.cores is None:
        return {}
    norms = [cores.double().square().sum((1, 2)).tolist() for cores in (old.cores, new.cores)]
    return {key: list(zip(*norms, strict=True))}


def _size(k: Any) -> tuple[int, int]:
    pair = tuple(k) if isinstance(k, (tuple, list)) else (k, k)
    sizes = [whole_number(each) for each in pair]
    if len(sizes) != 2 or any(each is None or each < 1 for each in sizes):
        raise SubspaceError(f"k={k!r}: give a number of directions from 1 on, or two of them.")
    return int(sizes[0] or 0), int(sizes[1] or 0)


def _weights(given: Mapping[str, float], tasks: Mapping[str, Any]) -> dict[str, float]:
    if unknown := [name for name in given if name not in tasks]:
        raise SubspaceError(f"weights: there is no task {unknown[0]!r}; there are {', '.join(map(repr, tasks))}.")
    if wrong := [name for name, weight in given.items() if not is_finite(weight) or weight <= 0]:
        raise SubspaceError(f"weights: {wrong[0]!r} has {given[wrong[0]]!r}; give numbers above 0.")
    return {name: float(given.get(name, 1.0)) for name in tasks}
