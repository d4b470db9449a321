"""What may be written where: the one check of all writers, before the long work and again before they write."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._io.disk import reading, writable
from .._io.occupied import (
    ADAPTER,
    BASIS,
    BUNDLE,
    FILES,
    FILES_OF,
    GIT,
    LORA,
    MODEL,
    REPLACED,
    REPORT,
    TASK,
    Found,
    look,
)
from ..errors import OccupiedError, SubspaceError
from .dependents import named_dependents

# kinds whose files are ours or PEFT's: what is left of them beside another kind is removed
CLEARED = (BASIS, TASK, LORA, ADAPTER, BUNDLE)
REMEDY = "Give another place, or replace it with overwrite=True (--force)."


@dataclass(frozen=True)
class Planned:
    """A thing that is about to be written.

    Attributes:
        kind: one of the kinds of `_io.occupied`.
        basis: fingerprint of the basis that it is, is on, or is exported from; None while that is not known.
        tasks: the names of all tasks that it will hold, of a bundle or a bank.
        certain: whether `basis` is known. Where it is not, an earlier thing of the same kind passes, and is looked at
            again when the new one is written.
    """

    kind: str
    basis: str | None = None
    tasks: frozenset[str] | None = None
    certain: bool = True

    def replaces(self, found: Found) -> bool:
        """Return whether `found` is the same thing, in an earlier state."""
        if found.kind != self.kind:
            return False
        if self.certain and (found.basis != self.basis or (found.kind == LORA and found.basis is None)):
            return False
        return not self.lost(found)

    def lost(self, found: Found) -> list[str]:
        """Return the tasks of `found`, of the same kind and basis, that would be gone."""
        return [] if self.tasks is None or found.kind != self.kind else sorted(found.tasks - self.tasks)


def check_target(
    target: str | Path,
    planned: Planned,
    *,
    overwrite: bool = False,
    inputs: Iterable[Any] = (),
    needed: Iterable[Any] = (),
) -> list[Found]:
    """Check that a thing may be written at a place; nothing is changed.

    Args:
        target: the folder or file to be written.
        planned: what is about to be written there.
        overwrite: whether other things there may be replaced.
        inputs: what it is made from. Only folders and files of this machine count.
        needed: what it refers to, or is still read while it is written; never replaced.

    Returns:
        What lies there and is not the same thing.

    Raises:
        OccupiedError: something else lies there, or the place is one of the inputs or inside one, and `overwrite` is
            off; or it is one of those needed.
        SubspaceError: the place can be no folder.
        OSError: the place cannot be looked at, or not be written.
    """
    target = Path(target).expanduser()
    with reading(target):
        found = [*look(target), *_foreign(target, planned)]
        if target.is_file() and planned.kind in FILES_OF:
            raise SubspaceError(
                f"{target} is a file; {planned.kind} is written into a folder. Give the name of a folder."
            )
    writable(target)
    needed = list(_local(needed))
    if target.resolve() in needed:
        raise OccupiedError(
            f"{target} is what {planned.kind} written there would still need. Give another place: no flag or argument"
            " allows this one."
        )
    others = [] if any(planned.replaces(each) for each in found) else found
    if overwrite:
        return others
    for place in (*needed, *_local(inputs)):
        if _inside(target, place):
            words = [each for thing in found if thing.kind == BASIS and (each := named_dependents(thing.basis))]
            raise OccupiedError(
                f"{target} is {_relation(target, place)}, from which {planned.kind} would be made."
                f"{''.join(f' {each}.' for each in words)} Give another place; overwrite=True (--force) would destroy"
                " what is there."
            )
    if others:
        raise OccupiedError(_refusal(target, planned, others))
    return []


@contextmanager
def replacing(
    target: str | Path, planned: Planned, *, overwrite: bool = False, needed: Iterable[Any] = ()
) -> Iterator[None]:
    """Check a place, let the thing be written, and clear away what is left there of other things.

    Args:
        target: the folder or file that is written within.
        planned: what is written.
        overwrite: whether other things there may be replaced. What depends on a basis that is replaced is then named
            in a warning, and so is what stays beside the new thing.
        needed: see `check_target`, as are the errors.
    """
    others = check_target(target, planned, overwrite=overwrite, needed=needed)
    said = [words for each in others if each.kind == BASIS and (words := named_dependents(each.basis))]
    target = Path(target).expanduser()
    before = {name: _mark(target / name) for each in others for name in each.files}
    yield
    kept = []
    for each in others:
        # those that were not written again
        left = [name for name in each.files if before[name] is not None and _mark(target / name) == before[name]]
        if planned.kind != REPORT and each.kind in CLEARED:
            for name in left:
                (target / name).unlink(missing_ok=True)
        elif left:
            kept.append(str(each))
    if said:
        warnings.warn(f"{target}: a basis was replaced, and {'; '.join(said)}.", stacklevel=4)
    if kept:
        warnings.warn(
            f"{target}: beside {planned.kind} the folder still holds {' and '.join(kept)}, by which it may be taken"
            " for that. Move one of them.",
            stacklevel=4,
        )


def _mark(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _foreign(target: Path, planned: Planned) -> Iterator[Found]:
    """Yield the files that would be replaced though no thing of the kind lies there."""
    if target.is_dir() and not any(each.kind == planned.kind for each in look(target)):
        known = {name for each in look(target) for name in each.files}
        names = [name for name in REPLACED.get(planned.kind, ()) if name not in known and (target / name).exists()]
        if names:
            yield Found(FILES, tuple(names), more="files that would be replaced")


def _refusal(target: Path, planned: Planned, others: list[Found]) -> str:
    text = f"{target} holds {' and '.join(map(str, others))}. "
    for each in others:
        if lost := planned.lost(each):
            return text + (
                f"Its {len(lost)} tasks that are not among those given, such as {lost[0]!r}, would be gone. Add to it"
                " with `add_tasks` (`subspace-peft bundle add`), or replace it with overwrite=True (--force)."
            )
    if any(each.kind == LORA and each.basis is None for each in others):
        text += "That LoRA is no export of this package, and may be the result of a training. "
    elif any(each.kind in (FILES, MODEL, GIT) for each in others):
        text += f"{planned.kind.capitalize()} would be mixed with it or replace it. "
    elif planned.certain and planned.basis and any(each.kind == planned.kind for each in others):
        text += f"What is to be written is of the basis {planned.basis[:12]}. "
    for each in others:
        if each.kind == BASIS and (words := named_dependents(each.basis)):
            text += f"{words}. "
    return text + REMEDY


def _local(references: Iterable[Any]) -> Iterator[Path]:
    for each in references:
        if isinstance(each, (str, os.PathLike)):
            try:
                place = Path(each).expanduser()
                if place.exists():
                    yield place.resolve()
            except (OSError, RuntimeError, ValueError):
                continue


def _inside(target: Path, place: Path) -> bool:
    own = target.resolve()
    # of a source that is a single file, its folder may well be written into
    return own == place or (place.is_dir() and place in own.parents and bool(look(place)))


def _relation(target: Path, place: Path) -> str:
    return f"the same place as {place}" if target.resolve() == place else f"inside {place}"
