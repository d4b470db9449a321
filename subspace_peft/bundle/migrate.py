"""A bundle's tasks onto another basis, such as the next version of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..basis import SubspaceBasis
from ..basis.transfer import Transfer
from ..convert.migrate import MAX_DRIFT, drifts_of, moved_config, moves_of, used_moves
from ..errors import SubspaceError
from ..tasks.read import Parts, SavedTask
from .bundle import Bundle, open_bundle
from .named import Named
from .write import pack, write_bundle


def migrate_bundle(
    bundle: str | Path | Bundle,
    basis: SubspaceBasis | str | Path,
    out: str | Path,
    *,
    max_drift: float = MAX_DRIFT,
    old_basis: SubspaceBasis | str | Path | None = None,
    token: str | bool | None = None,
    progress: bool = True,
) -> tuple[Bundle, dict[str, dict[str, float]]]:
    """Write a bundle of the same tasks on another basis; see `migrate_task`. Cores are padded or projected; trained
    modules, residuals and what the index says of a task (scores, where it came from, energies) go along.

    Args:
        bundle: folder, file or Hub id of a bundle, or an open one.
        basis: the basis to carry its tasks to, stored somewhere.
        out: the folder to write; another one than the bundle's.
        max_drift: refuse where a module's ``U core V`` changes by more than this share of its norm; the default admits
            rounding only.
        old_basis: where the bundle's own basis is, if not where it says.
        token: as in huggingface_hub.
        progress: show a bar where it takes longer than two seconds.

    Returns:
        The new bundle, and per task its modules' drifts, of the cores as they are stored.

    Raises:
        SubspaceError: more drift than `max_drift`, naming the task; a basis in memory only; `out` is the bundle
            itself.
        BasisMismatchError: the new basis lacks a module of a task.
        BadFileError: a task's bytes are damaged.
    """
    found = open_bundle(bundle, token=token)
    new = basis if isinstance(basis, SubspaceBasis) else SubspaceBasis.from_pretrained(basis, token=token)
    if new.location is None:
        raise SubspaceError(
            "The bundle refers to its new basis, which has to be stored: `basis.save_pretrained(folder)` first."
        )
    if Path(out).expanduser().resolve() == Path(found.location).expanduser().resolve():
        raise SubspaceError(f"{out} is the bundle itself. Write the new one beside it.")
    dtype = found.dtype
    packed, drifts = [], {}
    for name, moved, each in _carried(found, new, max_drift, old_basis, progress):
        drifts[name] = each
        entry = {key: value for key, value in found.entry(name).items() if key not in ("config", "modules", "sha256")}
        packed.append(pack(Named(name, moved, entry.pop("source", {})), dtype, **entry))
    if not packed:
        raise SubspaceError(f"{found.location}: there is no task in it.")
    return write_bundle(packed, Path(out), dtype), drifts


def bundle_drifts(
    bundle: str | Path | Bundle,
    basis: SubspaceBasis,
    *,
    max_drift: float = MAX_DRIFT,
    old_basis: SubspaceBasis | str | Path | None = None,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """What `migrate_bundle` would return and raise, with nothing written; `basis` may live in memory."""
    carried = _carried(open_bundle(bundle), basis, max_drift, old_basis, progress)
    return {name: drifts for name, _, drifts in carried}


def _carried(
    bundle: Bundle, new: SubspaceBasis, max_drift: float, old_basis: Any, progress: bool
) -> Iterator[tuple[str, SavedTask, dict[str, float]]]:
    """Name, task on the new basis and drifts, of the cores as they are stored."""
    dtype = bundle.dtype
    known: dict[tuple[Any, ...], dict[str, Transfer]] = {}
    for name in tqdm(bundle, desc="migrating", unit="task", delay=2, disable=not progress):
        task = bundle.task(name, old_basis)
        key = tuple((module, *core.shape) for module, core in task.cores.items())
        # tasks of one size share what takes time: reading both bases
        moves = known[key] if key in known else known.setdefault(key, moves_of(task, new, name))
        config = moved_config(task.config, new, moves)
        used = used_moves(config, moves)
        cores = {module: used[module].core(core) for module, core in task.cores.items()}
        stored = {module: core.to(dtype).double() for module, core in cores.items()}
        sizes = {module: tuple(core.shape) for module, core in cores.items()}
        modules = Parts(sizes, new, {module: str(new.find(module)) for module in cores})
        moved = dataclasses.replace(task, config=config, cores=cores, modules=modules)
        drifts, _ = drifts_of(task, dataclasses.replace(moved, cores=stored), used, f"task {name!r}", max_drift)
        yield name, moved, drifts
