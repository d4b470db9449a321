"""List the tasks in the arguments of `bundle_tasks`, each with its name and origin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._adapted import unwrapped
from .._io.digest import file_sha256
from ..convert.projection import Projection
from ..errors import SubspaceError
from ..hub import split_revision
from ..tasks.bank import TaskBank
from ..tasks.read import SavedTask, read_task
from ..tuner.config import SubspaceConfig
from ..tuner.task_file import WEIGHTS_FILE


@dataclass(frozen=True, eq=False)
class Named:
    """A task with its name, and `location`, `revision` and `sha256` of the file it was made from."""

    name: str
    task: SavedTask
    source: dict[str, Any]


def named_tasks(tasks: Any, *, basis: Any = None, token: str | bool | None = None) -> Iterator[Named]:
    """Yield the tasks in the `tasks` of `bundle_tasks`. Arguments and errors are those of that function."""
    if isinstance(tasks, Mapping) and not isinstance(tasks, TaskBank):
        for name, reference in tasks.items():
            found = list(_tasks_in(reference, basis, token))
            if len(found) != 1:
                raise SubspaceError(
                    f"{name!r}: it has {len(found)} tasks, which cannot have one name. Pass it in a list."
                )
            yield Named(name, found[0].task, found[0].source)
        return
    several = isinstance(tasks, Sequence) and not isinstance(tasks, str)
    for reference in tasks if several else [tasks]:
        yield from _tasks_in(reference, basis, token)


def _tasks_in(reference: Any, basis: Any, token: str | bool | None) -> Iterator[Named]:
    memory = {"location": "in memory", "revision": None}
    reference = unwrapped(reference)
    if isinstance(reference, TaskBank):
        for name in reference:
            yield Named(name, reference.as_task(name), memory)
    elif isinstance(reference, Projection):
        source = reference.source
        where = {"location": source.location, "revision": source.revision, "sha256": source.sha256}
        parts = reference.parts
        if len(parts) < 2:
            yield Named(source.name, reference.as_task(), where)
            return
        for part, projection in parts.items():
            yield Named(f"{source.name}.{part}", projection.as_task(), where)
    elif isinstance(reference, SavedTask):
        raise SubspaceError("A SavedTask has no name: give a mapping, name → SavedTask.")
    elif hasattr(reference, "peft_config"):
        names = [name for name, config in reference.peft_config.items() if isinstance(config, SubspaceConfig)]
        if not names:
            raise SubspaceError("A model without subspace adapters was given; there is nothing to pack.")
        for name in names:
            yield Named(name, read_task(reference, adapter_name=name), memory)
    elif isinstance(reference, (str, Path)):
        yield _saved(reference, basis, token)
    else:
        raise SubspaceError(
            f"A task is a folder, a Hub id, a PeftModel, a TaskBank or a Projection; got {type(reference).__name__}."
        )


def _saved(reference: str | Path, basis: Any, token: str | bool | None) -> Named:
    folder = Path(reference).expanduser()
    repo, revision = (str(folder), None) if folder.is_dir() else split_revision(str(reference))
    hub = {key: value for key, value in (("revision", revision), ("token", token)) if value is not None}
    task = read_task(repo, basis=basis, **hub)
    near = Path(str(task.config.loaded_from.folder))
    sha = near.name if not folder.is_dir() and near.parent.name == "snapshots" else None
    where = {
        "location": str(folder.resolve()) if folder.is_dir() else repo,
        "revision": sha,
        "sha256": file_sha256(near / WEIGHTS_FILE),
    }
    return Named(Path(folder.resolve() if folder.is_dir() else repo).name, task, where)
