"""Migrate a task from one basis to another, such as the basis's next version, in closed form.

The loss is measured on the parameters that are written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .._shown import Shown, Table, fingerprint
from ..basis import SubspaceBasis
from ..basis.module import module_shape
from ..basis.transfer import Transfer
from ..errors import SubspaceError
from ..tasks.read import SavedTask, assemble, read_task, read_tensors
from ..tasks.write import PREFIX, core_tensors, own_tensors_of, write_task
from ..tuner import SubspaceConfig
from ..tuner.card import MEASURED, digest_of
from ..tuner.coefficients import OWN
from ..tuner.task_file import BASIS_KEY, COEFFICIENT_KEY
from .moves import (
    check_leading,
    drifts_of,
    inside,
    keep_own,
    keep_sizes,
    moved_config,
    moves_of,
    plain_config,
    used_moves,
)
from .same_kind import Coefficients, same_kind

MAX_DRIFT = 1e-5


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
    pad: bool = True,
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
    the number of directions changes the scale. A task with a `k` of its own keeps it and its parameters. With
    ``pad=False`` every task does: its tensors stay byte for byte, and its configuration says how many of the new
    basis's directions it uses, so that its outputs stay bit for bit.

    Directions of its own (`extra_rank`) stay as they are where the new basis does not contain them. Where it does, as
    after `update_basis` with the task as a source, they become part of the core, and the coefficients `core`: nothing
    is lost, and the task is smaller.

    To another basis, `core`, `factor` and `none` are projected, and so are `directions` if the basis has the
    projections of the old direction tensors. Otherwise, and always with `diagonal`, the task gets `core` coefficients;
    also if the new mean core is not the projection of the old one, in which case the mean update becomes part of the
    core.

    Args:
        task: Folder or Hub id of a saved task, which may carry its own basis; a live PeftModel; or a `SavedTask`,
            whose coefficients become `core`.
        basis: The basis to migrate to, its folder or its Hub id.
        pad: Whether the task also gets the new directions, which it can then be trained in; else its tensors stay.
        max_drift: Largest share of the norm of a module's ΔW that may change; the default admits rounding only.
        adapter_name: The adapter of a live model; the active one by default.
        old_basis: The task's own basis, its folder or its Hub id; by default the place that its config names.
        token: As in huggingface_hub.
        **hub: `revision`, `cache_dir` and `subfolder` of a task on the Hub.

    Raises:
        BasisMismatchError: The new basis lacks a module of the task, or has it in another shape.
        SubspaceError: A module drifts by more than `max_drift`; with ``pad=False`` the new basis does not begin with
            the task's own; also the errors of `read_task`.
    """
    if not max_drift >= 0:
        raise SubspaceError(f"max_drift={max_drift}: give 0 or more, as a share of ‖ΔW‖.")
    if token is not None and isinstance(task, (str, Path)):
        hub = {**hub, "token": token}
    config, tensors, old = _read(task, adapter_name, old_basis, hub)
    new = basis if isinstance(basis, SubspaceBasis) else SubspaceBasis.from_pretrained(basis, token=token)
    what = str(task) if isinstance(task, (str, Path)) else "the model's task"
    moves = moves_of(old, new, what)
    moved_to = moved_config(config, new, moves)
    if pad:
        written, converted = _moved(config, tensors, old, moved_to, moves)
    else:
        check_leading(old, moves, what)
        keep_sizes(moved_to, moves)
        written, converted = {key: value for key, value in tensors.items() if COEFFICIENT_KEY.match(key)}, None
    others = {
        key: value.contiguous()
        for key, value in tensors.items()
        if not COEFFICIENT_KEY.match(key) and not BASIS_KEY.match(key)
    }
    used = used_moves(moved_to, moves)
    drift, total = drifts_of(old, assemble(moved_to, written, new), used, what, max_drift)
    moved_to.card = _card(config, tensors, written, total)
    return Migration(moved_to, {**others, **written}, drift, total, converted)


def _read(
    task: Any, adapter_name: str | None, basis: SubspaceBasis | str | None, hub: dict[str, Any]
) -> tuple[SubspaceConfig, dict[str, torch.Tensor], SavedTask]:
    """Return a task's configuration, its tensors by key, and what they stand for."""
    if isinstance(task, SavedTask):
        read = read_task(task, adapter_name=adapter_name, basis=basis, **hub)
        config = plain_config(read)
        tensors = {**core_tensors(config, read.cores), **own_tensors_of(config, read.own), **read.extras}
        return config, tensors, replace(read, config=config)
    config, tensors, own_basis = read_tensors(task, adapter_name=adapter_name, basis=basis, **hub)
    tensors = {key: value.detach().cpu() for key, value in tensors.items()}
    return config, tensors, assemble(config, tensors, own_basis)


def _moved(
    config: SubspaceConfig,
    tensors: Mapping[str, torch.Tensor],
    old: SavedTask,
    moved_to: SubspaceConfig,
    moves: Mapping[str, Transfer],
) -> tuple[dict[str, torch.Tensor], str | None]:
    """Return a task's trained tensors on the new basis by key, and the kind that it had, if it has another one now.

    Args:
        config: Its configuration.
        tensors: All of its tensors.
        old: What they stand for.
        moved_to: Its configuration on the new basis; changed where the kind, or the own directions, are others there.
        moves: Module → transfer to the whole of the new basis's module.
    """
    coefficients: dict[str, Coefficients] = {name: {} for name in old.cores}
    own: dict[str, Coefficients] = {name: {} for name in old.cores}
    for key, value in tensors.items():
        if found := COEFFICIENT_KEY.match(key):
            (own if found["name"] in OWN else coefficients)[found["module"]][found["name"]] = value
    absorbed = inside(old, moves)
    if absorbed:
        # directions beyond those that it used hold its own part
        moved_to.k, moved_to.rank_pattern = None, {}
        kept = keep_own(moved_to, old, absorbed)
        own = {name: each if name in kept else {} for name, each in own.items()}
    used = used_moves(moved_to, moves)
    shapes = {name: module_shape(move.new) for name, move in moves.items()}
    made = {
        name: same_kind(config, moved_to, name, each, used[name], shapes[name]) for name, each in coefficients.items()
    }
    converted = None
    plain = config.coefficients == "core" and config.mean_gain == "none"
    if any(each is None for each in made.values()) or (absorbed and not plain):
        converted = config.coefficients
        moved_to.coefficients, moved_to.mean_gain = "core", "none"
    if converted is not None or absorbed:
        for name, core in old.cores.items():
            moved = used[name].core(core)
            moved = moved + absorbed[name] if name in absorbed else moved
            made[name] = {"weight": moved / moved_to.sizes.scale(name, shapes[name])}
    written = {
        f"{PREFIX}{name}.subspace_coef.{part}": value.float().contiguous()
        for name, each in made.items()
        for part, value in {**(each or {}), **own[name]}.items()
    }
    return written, converted


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
