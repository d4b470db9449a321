"""Absorb a task's own directions into its basis: the next version of the basis, and the task on it as a plain core."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..basis import SubspaceBasis
from ..builders import update_basis
from ..builders.absorb import is_on
from ..errors import SubspaceError
from ..tasks.read import Parts, read_task
from .migrate import MAX_DRIFT, Migration, migrate_task


def absorb_task(
    task: Any,
    basis: SubspaceBasis | str | Path | None = None,
    *,
    max_drift: float = MAX_DRIFT,
    adapter_name: str | None = None,
    progress: bool = True,
    token: str | bool | None = None,
    **hub: Any,
) -> tuple[SubspaceBasis, Migration]:
    """Grow a basis by a task's own directions, and make the task a plain core on it, without a change of its outputs.

    `update_basis` with the task as its source finds the directions that the basis lacks, at most `extra_rank` per
    side, and `migrate_task` moves the task. Both are in memory: save the basis first, then the task. Other tasks move
    by `migrate_task` as well, padded with zeros or as they are.

    Args:
        task: Folder or Hub id of a saved task, a live PeftModel, or a `SavedTask`.
        basis: The basis to grow, its folder or its Hub id: the task's own, by default, or a later version of it.
        max_drift: Largest share of the norm of a module's ΔW that may change; the default admits rounding only.
        adapter_name: The adapter of a live model; the active one by default.
        progress: Show a bar where it takes longer than two seconds.
        token: As in huggingface_hub.
        **hub: `revision`, `cache_dir` and `subfolder` of a task on the Hub.

    Returns:
        The next version of the basis, or the very basis where it lacks nothing that the task uses; and the task on it,
        with no own directions and, where it had such, with `core` coefficients.

    Raises:
        SourceError: The basis has absorbed the task before, or the task does not fit it.
        SubspaceError: A module drifts by more than `max_drift`, as one of a task on another basis may; the task
            carries its own basis; also the errors of `read_task`.
    """
    if token is not None and isinstance(task, (str, Path)):
        hub = {**hub, "token": token}
    read = read_task(task, adapter_name=adapter_name, **hub)
    if basis is None:
        if not isinstance(read.modules, Parts):
            raise SubspaceError(
                "The task carries its own basis, which no other task can share. Save that one, and pass it as basis=."
            )
        basis = read.modules.basis
    old = basis if isinstance(basis, SubspaceBasis) else SubspaceBasis.from_pretrained(basis, token=token)
    nothing = not any(core.any() for core in read.cores.values())
    if not _alive(read.own) and (nothing or is_on(read, old)):
        # a core alone, or not even that where a classifier alone was trained: there is nothing to absorb
        if read.own:
            return old, migrate_task(replace(read, own={}), old, max_drift=max_drift)
        return old, migrate_task(task, old, max_drift=max_drift, adapter_name=adapter_name, **hub)
    # a file's sha256 is what the basis remembers the task by
    source = task if isinstance(task, (str, Path)) and not hub else read
    new = update_basis(old, [source], progress=progress, token=token)
    if new.shapes() == old.shapes():
        # all lies within the basis: there is no other version to move the tasks to
        new = old
    moved = migrate_task(task, new, max_drift=max_drift, adapter_name=adapter_name, **hub)
    if moved.config.coefficients == "core" and not moved.config.extra_rank and not moved.config.extra_rank_pattern:
        return new, moved
    # another kind, or own directions that are zero
    return new, migrate_task(replace(read, own=_alive(read.own)), new, max_drift=max_drift)


def _alive(own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the own directions that are not zero."""
    return {name: pair for name, pair in own.items() if all(side.any() for side in pair)}
