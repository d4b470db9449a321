"""Migrate a task from one basis to another, such as the basis's next version, in closed form.

The loss is measured on the parameters that are written.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._shown import Shown, Table, fingerprint
from ..basis import SubspaceBasis
from ..basis.module import module_shape
from ..basis.module_store import names_of
from ..basis.transfer import Transfer
from ..errors import BasisMismatchError, SubspaceError
from ..tasks.read import SavedTask, assemble, read_tensors
from ..tasks.write import write_task
from ..tuner import SubspaceConfig
from ..tuner.base_check import PROBED_SIDE
from ..tuner.card import MEASURED, digest_of
from ..tuner.task_file import BASIS_KEY, COEFFICIENT_KEY

MAX_DRIFT = 1e-5
ALIKE = 1e-5  # relative difference that float32's rounding may make between two equal cores

Coefficients = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class Migration(Shown):
    """A task on another basis.

    Attributes:
        config: Its configuration there.
        tensors: The tensors of its file, by key.
        drift: Module → ``‖ΔW_old − ΔW_new‖_F / ‖ΔW_old‖_F`` of the parameters as they are stored, the fleet's mean
            update included.
        total_drift: The same over all modules together.
        converted: The kind of coefficients that the task had, if the new basis could not hold it; else None.
    """

    config: SubspaceConfig
    tensors: dict[str, torch.Tensor]
    drift: dict[str, float]
    total_drift: float
    converted: str | None

    def _shown_facts(self) -> Iterator[tuple[str, Any]]:
        yield "coefficients", self.config.coefficients
        yield "converted from", self.converted
        yield "modules", len(self.drift)
        yield "drift", f"{self.total_drift:.2g}"
        yield "basis", fingerprint(self.config.basis_fingerprint)

    def _shown_table(self) -> Table:
        return ("module", "drift"), ((name, f"{each:.2g}") for name, each in self.drift.items()), len(self.drift)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the tensors, as JSON values."""
        return {
            "fingerprint": self.config.basis_fingerprint,
            "coefficients": self.config.coefficients,
            "converted_from": self.converted,
            "drift": self.total_drift,
            "drift_per_module": self.drift,
        }

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the task as a folder that `PeftModel.from_pretrained` loads.

        Args:
            folder: Made where it does not exist.
            overwrite: See `write_task`.

        Returns:
            The folder.

        Raises:
            SubspaceError: The new basis lives in memory only, or `folder` is a file.
            OSError: The disk refuses; an earlier folder stays as it was.
        """
        return write_task(folder, self.config, self.tensors, overwrite=overwrite)


def migrate_task(
    task: Any,
    basis: SubspaceBasis | str | Path,
    *,
    max_drift: float = MAX_DRIFT,
    adapter_name: str | None = None,
    old_basis: SubspaceBasis | str | None = None,
    token: str | bool | None = None,
    **hub: Any,
) -> Migration:
    """Migrate a task to another basis, in closed form.

    The new core is ``C' = (U'ᵀ U) C (V V'ᵀ)``, and the trained parameters θ' are those with ``s'·C(θ') + g·M' = C'``.

    To a basis grown by `update_basis` or filled up by `complete_basis`, this is exact for all kinds of coefficients:
    the new basis begins with the old directions, so the parameters are padded with zeros, and multiplied by s/s' where
    the number of directions changes the scale. A task with a `k` of its own keeps it and its parameters.

    To another basis, `core`, `factor` and `none` are projected, and so are `directions` if the basis has the
    projections of the old direction tensors. Otherwise, and always with `diagonal`, the task gets `core` coefficients;
    also if the new mean core is not the projection of the old one, in which case the mean update becomes part of the
    core.

    Args:
        task: Folder or Hub id of a saved task, which may carry its own basis; or a live PeftModel.
        basis: The basis to migrate to, its folder or its Hub id.
        max_drift: Largest share of the norm of a module's ΔW that may change; the default admits rounding only.
        adapter_name: The adapter of a live model; the active one by default.
        old_basis: The task's own basis, its folder or its Hub id; by default the place that its config names.
        token: As in huggingface_hub.
        **hub: `revision`, `cache_dir` and `subfolder` of a task on the Hub.

    Raises:
        BasisMismatchError: The new basis lacks a module of the task, or has it in another shape.
        SubspaceError: A module drifts by more than `max_drift`; also the errors of `read_task`.
    """
    if not max_drift >= 0:
        raise SubspaceError(f"max_drift={max_drift}: give 0 or more, as a share of ‖ΔW‖.")
    if token is not None and isinstance(task, (str, Path)):
        hub = {**hub, "token": token}
    config, tensors, own = read_tensors(task, adapter_name=adapter_name, basis=old_basis, **hub)
    tensors = {key: value.detach().cpu() for key, value in tensors.items()}
    old = assemble(config, tensors, own)
    new = basis if isinstance(basis, SubspaceBasis) else SubspaceBasis.from_pretrained(basis, token=token)
    what = str(task) if isinstance(task, (str, Path)) else "the model's task"
    moves = moves_of(old, new, what)
    coefficients: dict[str, Coefficients] = {name: {} for name in old.cores}
    for key, value in tensors.items():
        if found := COEFFICIENT_KEY.match(key):
            coefficients[found["module"]][found["name"]] = value
    moved_to = moved_config(config, new, moves)
    used = used_moves(moved_to, moves)
    shapes = {name: module_shape(move.new) for name, move in moves.items()}
    made = {
        name: _same_kind(config, moved_to, name, each, used[name], shapes[name]) for name, each in coefficients.items()
    }
    converted = None
    if any(each is None for each in made.values()):
        converted = config.coefficients
        moved_to.coefficients, moved_to.mean_gain = "core", "none"
        for name, core in old.cores.items():
            made[name] = {"weight": used[name].core(core) / moved_to.sizes.scale(name, shapes[name])}
    written = {
        f"base_model.model.{name}.subspace_coef.{part}": value.float().contiguous()
        for name, each in made.items()
        for part, value in (each or {}).items()
    }
    others = {
        key: value.contiguous()
        for key, value in tensors.items()
        if not COEFFICIENT_KEY.match(key) and not BASIS_KEY.match(key)
    }
    drift, total = drifts_of(old, assemble(moved_to, written, new), used, what, max_drift)
    moved_to.card = _card(config, tensors, written, total)
    return Migration(moved_to, {**others, **written}, drift, total, converted)


def moves_of(old: SavedTask, new: SubspaceBasis, what: str) -> dict[str, Transfer]:
    """Compute the transfer of every module of a task from the part of its basis that it uses to a new basis.

    Args:
        old: The task.
        new: The basis to migrate to.
        what: The task, for messages.

    Returns:
        Module → transfer to the whole of the new basis's module.

    Raises:
        BasisMismatchError: The new basis lacks a module, or has it in another shape.
    """
    new = new.named(old.config.basis_names or {})
    absent = [name for name in old.cores if new.find(name) is None]
    if absent:
        raise BasisMismatchError(
            f"{what}: {len(absent)} of its modules are not in the new basis, such as {names_of(absent, 3)}; it has"
            f" {names_of(new, 3)}. Migrate it to a version of its own basis."
        )
    return {name: Transfer(old.modules[name], new[str(new.find(name))], name) for name in old.cores}


def moved_config(config: SubspaceConfig, new: SubspaceBasis, moves: Mapping[str, Transfer]) -> SubspaceConfig:
    """Make the task's configuration on the new basis."""
    moved = copy.deepcopy(config)
    moved.basis, moved.basis_revision, moved.basis_fingerprint = new, new.revision, new.fingerprint
    moved.basis_modules = moved.save_basis = moved.bundle = moved.loaded_from = None
    if not all(move.leading for move in moves.values()):
        # the leading k of other directions would be another choice than the one that was made
        moved.k, moved.rank_pattern = None, {}
    if not all(_probed_alike(move) for move in moves.values()):
        moved.base_probe = None
    return moved


def used_moves(moved: SubspaceConfig, moves: Mapping[str, Transfer]) -> dict[str, Transfer]:
    """Restrict every module's transfer to the part of the new basis that the task uses."""
    return {name: Transfer(move.old, moved.sizes.part(name, move.new), name) for name, move in moves.items()}


def drifts_of(
    old: SavedTask, now: SavedTask, moves: Mapping[str, Transfer], what: str, max_drift: float
) -> tuple[dict[str, float], float]:
    """Measure which share of ΔW's norm a migration changes.

    Args:
        old: The task before.
        now: The task afterwards, its cores as they are stored.
        moves: Module → transfer to the part of the new basis that the task uses.
        what: The task, for messages.
        max_drift: Largest share that may change in a module.

    Returns:
        Module → share, and the share over all modules together.

    Raises:
        SubspaceError: A module drifts by more than `max_drift`.
    """
    drift, lost, total = {}, 0.0, 0.0
    for name, core in old.cores.items():
        drift[name] = moves[name].drift(core, now.cores[name])
        square = float(core.square().sum())
        lost, total = lost + drift[name] ** 2 * square if square else lost, total + square
    worst = max(drift, key=drift.__getitem__)
    if drift[worst] > max_drift:
        raise SubspaceError(
            f"{what}: on the new basis module {worst!r} would change by {drift[worst]:.3g} of its update's norm, more"
            f" than max_drift={max_drift:g}. Grow the basis with `update_basis(…, add=…)`"
            " (`subspace-peft update --add`), which loses nothing, give it a larger k, or allow more with"
            " max_drift= (--max-drift)."
        )
    return drift, (lost / total) ** 0.5 if total else 0.0


def _probed_alike(move: Transfer) -> bool:
    sides = ((move.old.k_out, move.new.k_out), (move.old.k_in, move.new.k_in))
    return move.leading and all(old == new or old >= PROBED_SIDE for old, new in sides)


def _same_kind(
    config: SubspaceConfig,
    moved: SubspaceConfig,
    name: str,
    numbers: Coefficients,
    move: Transfer,
    shape: Mapping[str, int],
) -> Coefficients | None:
    """Compute trained parameters of the same kind in the new basis.

    Args:
        config: The task's configuration.
        moved: Its configuration on the new basis.
        name: The module.
        numbers: The module's trained parameters, by name.
        move: Transfer to the part of the new basis that the task uses.
        shape: Sizes of the new basis's module.

    Returns:
        The parameters by name, float64; None if the new basis cannot hold this kind exactly.
    """
    ratio = config.sizes.scale(name, module_shape(move.old)) / moved.sizes.scale(name, shape)
    old, new = move.old, move.new
    if config.mean_gain != "none" and not (
        old.M is not None and new.M is not None and _alike(move.core(old.M), new.M.double())
    ):
        return None
    gain = {"gain": numbers["gain"].double()} if "gain" in numbers else {}
    if config.coefficients == "none":
        return gain
    sizes = moved.sizes.expected(name, shape)
    if config.coefficients == "core":
        return {"weight": move.core(numbers["weight"]) * ratio, **gain}
    if config.coefficients == "factor":
        return {**_factors(numbers, move, sizes["down"][0], ratio), **gain}
    if config.coefficients == "diagonal":
        k = min(old.k_out, old.k_in)
        core = torch.zeros(old.k_out, old.k_in, dtype=torch.float64)
        core[:k, :k] = torch.diag(numbers["weight"].double())
        core = move.core(core) * ratio
        found = core.diagonal().clone()
        core.diagonal().zero_()
        return {"weight": found, **gain} if float(core.norm()) <= ALIKE * float(found.norm()) else None
    if config.coefficients != "directions" or old.G is None or new.G is None or len(new.G) < len(old.G):
        return None
    images, targets = move.core(old.G), new.G[: len(old.G)].double()
    along = (images * targets).sum((1, 2))
    if not _alike(images, along[:, None, None] * targets):
        return None
    weight = torch.zeros(len(new.G), dtype=torch.float64)
    weight[: len(old.G)] = numbers["weight"].double() * along * ratio
    return {"weight": weight, **gain}


def _factors(numbers: Coefficients, move: Transfer, r: int, ratio: float) -> Coefficients:
    up, down = move.left @ numbers["up"].double(), numbers["down"].double() @ move.right
    up = up * ratio
    have = up.shape[1]
    if r < have:
        P, S, Th = torch.linalg.svd(up @ down, full_matrices=False)
        return {"up": P[:, :r] * S[:r], "down": Th[:r]}
    # where r is more than the old basis had directions: rows for the new ones, which `up` leaves at zero, as at the
    # start of training
    rows = torch.eye(down.shape[1], dtype=torch.float64).flip(0)[: r - have]
    return {"up": torch.nn.functional.pad(up, (0, r - have)), "down": torch.cat([down, rows])}


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).norm()) <= ALIKE * max(float(one.norm()), 1e-300)


def _card(
    config: SubspaceConfig, read: dict[str, torch.Tensor], written: dict[str, torch.Tensor], drift: float
) -> dict[str, Any] | None:
    """Make the facts for the migrated task's card, which keeps its scores if the task still computes the same."""
    card = dict(config.card or {})
    if drift > MAX_DRIFT or ("of" in card and card["of"] != digest_of(read)):
        card = {key: value for key, value in card.items() if key not in (*MEASURED, "of")}
    elif any(key in card for key in MEASURED):
        card["of"] = digest_of(written)
    return card or None
