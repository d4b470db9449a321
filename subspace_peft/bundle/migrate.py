"""Migrate the tasks of a bundle to another basis, such as the next version of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._io.occupied import BUNDLE
from .._io.progress import progress_bar
from ..basis import SubspaceBasis
from ..basis.overwriting import Planned, check_target
from ..basis.transfer import Transfer
from ..convert.migrate import MAX_DRIFT
from ..convert.moves import check_leading, drifts_of, inside, keep_own, keep_sizes, moved_config, moves_of, used_moves
from ..errors import SubspaceError
from ..sources import Factors
from ..tasks.read import Parts, SavedTask
from .bundle import Bundle, open_bundle
from .named import Named
from .pack import pack
from .write import write_bundle

# of a task's entry in the index: what packing it again says
FORGOTTEN = ("config", "modules", "sha256", "residual_rank")


def migrate_bundle(
    bundle: str | Path | Bundle,
    basis: SubspaceBasis | str | Path,
    out: str | Path,
    *,
    pad: bool = True,
    max_drift: float = MAX_DRIFT,
    old_basis: SubspaceBasis | str | Path | None = None,
    overwrite: bool = False,
    token: str | bool | None = None,
    progress: bool = True,
) -> tuple[Bundle, dict[str, dict[str, float]]]:
    """Write a bundle of the same tasks on another basis; see `migrate_task`.

    Cores are padded or projected. Trained modules, own directions and the entries of the index (scores, origin,
    energies) go along; own directions that the new basis contains become part of the core.

    Args:
        bundle: Folder, file or Hub id of a bundle, or an open one.
        basis: The basis to migrate to, its folder or its Hub id; it has to be stored.
        out: The folder to write; another one than the bundle's.
        pad: See `migrate_task`; without it the cores stay as they are, and own directions up to rounding.
        max_drift: Largest share of the norm of a module's ``U core V`` that may change; the default admits rounding
            only.
        old_basis: The bundle's own basis, its folder or its Hub id; by default the place that the bundle names.
        overwrite: See `bundle_tasks`.
        token: As in huggingface_hub.
        progress: Show a bar where it takes longer than two seconds.

    Returns:
        The new bundle; and task → module → drift, of the cores as they are stored.

    Raises:
        SubspaceError: A task drifts by more than `max_drift`; the basis lives in memory only; or `out` is the bundle
            itself.
        BasisMismatchError: The new basis lacks a module of a task.
        BadFileError: A task's bytes are damaged.
    """
    found = open_bundle(bundle, token=token)
    new = basis if isinstance(basis, SubspaceBasis) else SubspaceBasis.from_pretrained(basis, token=token)
    if new.location is None:
        raise SubspaceError(
            "The bundle refers to its new basis, which has to be stored: `basis.save_pretrained(folder)` first."
        )
    if Path(out).expanduser().resolve() == Path(found.location).expanduser().resolve():
        raise SubspaceError(f"{out} is the bundle itself. Write the new one beside it.")
    planned = Planned(BUNDLE, new.fingerprint, frozenset(found))
    check_target(out, planned, overwrite=overwrite, needed=[found.location, new.location])
    dtype = found.dtype
    packed, drifts = [], {}
    for name, moved, each, absorbed in _carried(found, new, max_drift, pad, old_basis, progress):
        drifts[name] = each
        entry = {key: value for key, value in found.entry(name).items() if key not in FORGOTTEN}
        if absorbed and "energy_residual" in entry:
            # what was a residual is kept by the new basis
            gained = absorbed * entry["energy_residual"]
            entry |= {
                "energy_kept": entry["energy_kept"] + gained,
                "energy_residual": entry["energy_residual"] - gained,
            }
        packed.append(pack(Named(name, moved, entry.pop("source", {})), dtype, **entry))
    if not packed:
        raise SubspaceError(f"{found.location}: there is no task in it.")
    return write_bundle(packed, Path(out), dtype, overwrite=overwrite), drifts


def bundle_drifts(
    bundle: str | Path | Bundle,
    basis: SubspaceBasis,
    *,
    pad: bool = True,
    max_drift: float = MAX_DRIFT,
    old_basis: SubspaceBasis | str | Path | None = None,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Return the drifts that `migrate_bundle` would return, or raise its errors, without writing anything.

    Args:
        bundle: See `migrate_bundle`.
        basis: The basis to migrate to, which may live in memory only.
        pad: See `migrate_bundle`.
        max_drift: See `migrate_bundle`.
        old_basis: See `migrate_bundle`.
        progress: See `migrate_bundle`.
    """
    carried = _carried(open_bundle(bundle), basis, max_drift, pad, old_basis, progress)
    return {name: drifts for name, _, drifts, _ in carried}


def _carried(
    bundle: Bundle, new: SubspaceBasis, max_drift: float, pad: bool, old_basis: Any, progress: bool
) -> Iterator[tuple[str, SavedTask, dict[str, float], float]]:
    """Yield name, task on the new basis, drifts of the cores as stored, and the share of its own part in them now."""
    dtype = bundle.dtype
    known: dict[tuple[Any, ...], dict[str, Transfer]] = {}
    for name in progress_bar(bundle, desc="migrating", unit="task", shown=progress):
        task = bundle.task(name, old_basis)
        key = tuple((module, *core.shape) for module, core in task.cores.items())
        # tasks of one size share the slow part, reading both bases
        moves = known[key] if key in known else known.setdefault(key, moves_of(task, new, name))
        config = moved_config(task.config, new, moves)
        own, absorbed = dict(task.own), inside(task, moves) if pad else {}
        if not pad:
            check_leading(task, moves, f"task {name!r}")
            keep_sizes(config, moves)
        elif absorbed:
            # directions beyond those that it used hold its own part
            config.k, config.rank_pattern = None, {}
            own = {module: own[module] for module in keep_own(config, task, absorbed)}
        used = used_moves(config, moves)
        cores = {module: used[module].core(core) for module, core in task.cores.items()}
        cores |= {module: cores[module] + core for module, core in absorbed.items()}
        stored = {module: core.to(dtype).double() for module, core in cores.items()}
        sizes = {module: tuple(core.shape) for module, core in cores.items()}
        named = new.named(task.config.basis_names or {})
        modules = Parts(sizes, new, {module: str(named.find(module)) for module in cores})
        moved = dataclasses.replace(task, config=config, cores=cores, modules=modules, own=own)
        drifts, _ = drifts_of(task, dataclasses.replace(moved, cores=stored), used, f"task {name!r}", max_drift)
        energies = {module: Factors(B.double(), A.double()).norm() ** 2 for module, (B, A) in task.own.items()}
        yield name, moved, drifts, sum(map(energies.__getitem__, absorbed)) / (sum(energies.values()) or 1.0)
