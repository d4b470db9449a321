"""Pack tasks into a bundle, or add them to one, which is replaced only once the new file is whole."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .._io.atomic import write_aside
from .._io.occupied import BUNDLE
from .._io.places import is_absolute, last_part
from .._io.progress import progress_bar
from .._version import __version__
from ..basis import SubspaceBasis
from ..basis.dependents import add_dependent
from ..basis.module import FLOAT_DTYPES
from ..basis.overwriting import Planned, check_target, replacing
from ..basis.recorded import own_places, recorded_place
from ..cards import Place
from ..errors import BasisMismatchError, SubspaceError
from ..hub import looks_like_path
from ..hub_requests import patient
from .bundle import Bundle, open_bundle
from .card import write_card
from .dtypes import NAMES
from .format import BUNDLE_FILE, FORMAT_VERSION, encode_header, width
from .named import Named, named_tasks
from .pack import Packed, kept, pack


def bundle_tasks(
    tasks: Any,
    out: str | Path,
    *,
    basis: SubspaceBasis | str | Path | None = None,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    id2label: Mapping[str, Mapping[int, str]] | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    token: str | bool | None = None,
    progress: bool = True,
) -> Bundle:
    """Pack tasks on one basis into one file.

    Args:
        tasks: A list of saved tasks (folders, Hub ids with ``@revision``), PeftModels (all their subspace adapters),
            `TaskBank`s (all their tasks) and `Projection`s; or a mapping, name → such a task or a `SavedTask`. In a
            list, the last part of the folder's or repository's name is the task's name.
        out: The folder to write. An earlier bundle of these tasks in it is replaced once the new one is whole.
        basis: The basis, its folder or its Hub id; by default the place that the tasks name.
        metrics: Name → scores to record, JSON values.
        id2label: Name → names of the classes, where the task's own config does not have them.
        dtype: The dtype of the stored cores, in units of ΔW; trained modules keep theirs.
        overwrite: Replace what else lies in `out`, such as a bundle on another basis, or of tasks that are not among
            these.
        token: As in huggingface_hub.
        progress: Show a bar where it takes longer than two seconds.

    Returns:
        The bundle, opened.

    Raises:
        OccupiedError: Something else lies in `out`, and `overwrite` is off.
        BasisMismatchError: The tasks are on different bases.
        SubspaceError: No task is given, two have one name, a name could not be a folder's, the basis lives in memory
            only, or metrics or labels are given for a name that no task has.
        BadFileError: A task holds NaN or infinite values.
        OSError: The disk refuses; an earlier bundle stays.
    """
    given = tasks.values() if isinstance(tasks, Mapping) else tasks if isinstance(tasks, (list, tuple)) else [tasks]
    # which basis the tasks are on is known once they are read
    soon = Planned(BUNDLE, certain=False)
    check_target(out, soon, overwrite=overwrite, inputs=given, needed=[basis])
    packed = _pack_all(tasks, basis, metrics, id2label, dtype, token, progress)
    if not packed:
        raise SubspaceError("A bundle needs at least one task; none was given.")
    return write_bundle(packed, Path(out), dtype, overwrite=overwrite)


def add_tasks(
    bundle: str | Path | Bundle,
    tasks: Any,
    *,
    replace: bool = False,
    basis: SubspaceBasis | str | Path | None = None,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    id2label: Mapping[str, Mapping[int, str]] | None = None,
    token: str | bool | None = None,
    progress: bool = True,
) -> Bundle:
    """Add tasks to a bundle in a folder.

    The bundle's own tasks are copied byte for byte, and verified. The file is replaced once the new one is whole, so a
    failure leaves it as it was.

    Args:
        bundle: The bundle's folder, or the open bundle.
        tasks: See `bundle_tasks`.
        replace: Whether tasks may replace those that have their names.
        basis: See `bundle_tasks`.
        metrics: See `bundle_tasks`.
        id2label: See `bundle_tasks`.
        token: As in huggingface_hub.
        progress: Show a bar where it takes longer than two seconds.

    Returns:
        The new bundle, opened.

    Raises:
        SubspaceError: A name is taken, or the bundle is on the Hub; and see `bundle_tasks`.
        BasisMismatchError: A task is on another basis than the bundle.
        BadFileError: A task is damaged, one of the bundle's own or a new one.
        OSError: The disk refuses; the bundle stays as it was.
    """
    folder = Path(bundle.location if isinstance(bundle, Bundle) else bundle).expanduser()
    if not (folder / BUNDLE_FILE).is_file():
        raise SubspaceError(
            f"{folder}: there is no {BUNDLE_FILE} to add to. Make a bundle with"
            " `bundle_tasks` (`subspace-peft bundle create`); one on the Hub is fetched, added to, and pushed again."
        )
    with _locked(folder):
        old = open_bundle(folder)
        dtype = old.dtype
        packed = _pack_all(tasks, basis, metrics, id2label, dtype, token, progress)
        new = {each.name for each in packed}
        taken = sorted(name for name in new if name in old)
        if taken and not replace:
            raise SubspaceError(
                f"{folder} has a task {taken[0]!r} already ({len(taken)} of the given names are taken). Rename"
                " its folder, give a mapping of names to tasks in Python, or replace it with replace=True (--replace)."
            )
        kept_tasks = [kept(old, name) for name in old if name not in new]
        return write_bundle([*kept_tasks, *packed], folder, dtype, old)


def write_bundle(
    packed: Sequence[Packed],
    folder: Path,
    dtype: torch.dtype = torch.float32,
    old: Bundle | None = None,
    basis: tuple[str, str | None] | None = None,
    shown_as: Place | None = None,
    *,
    overwrite: bool = False,
) -> Bundle:
    """Write `bundle.safetensors` and a card into `folder`.

    Args:
        packed: The tasks, in order.
        folder: The folder to write, made where it does not exist.
        dtype: The dtype of the cores that are rows.
        old: A bundle whose common configuration and order of modules the new one takes over.
        basis: Location and commit to record for the basis; by default those of the tasks.
        shown_as: Where the card says to load the bundle from; the folder by default.
        overwrite: See `bundle_tasks`.

    Returns:
        The bundle, opened.

    Raises:
        OccupiedError: Something else lies in `folder`, and `overwrite` is off.
        SubspaceError: `folder` is a file.
        BasisMismatchError: The tasks are on different bases.
        OSError: The disk refuses; an earlier bundle stays.
    """
    index = _index(packed, None if old is None else old.index)
    common = index["config"]
    place, revision = (common.get("basis"), common.get("basis_revision")) if basis is None else basis
    needed = own_places(place, revision, index["basis_fingerprint"], None if old is None else old.near)
    recorded, _ = recorded_place(
        place,
        revision,
        index["basis_fingerprint"],
        folder=folder if shown_as is None else shown_as.folder,
        near=None if old is None else old.near,
    )
    index["config"] = {**common, "basis": recorded, "basis_revision": revision}
    rows = index["tasks"]
    tensors = [("cores", NAMES[dtype], (len(rows), width(index["modules"])))]
    place = len(rows) * width(index["modules"]) * dtype.itemsize
    by_name = {each.name: each for each in packed}
    parts: list[Callable[[], bytes]] = [by_name[name].data for name in rows]
    for number, name in enumerate(index["apart"]):
        task = by_name[name]
        if gap := -place % 8:
            # every tensor is aligned to 8 bytes, enough for any dtype
            tensors.append((f"{number}/pad", "U8", (gap,)))
            parts.append(lambda gap=gap: bytes(gap))
        tensors += [(f"{number}/{key}", kind, shape) for key, kind, shape in task.tensors]
        parts.append(task.data)
        place += gap + task.entry["bytes"]
    entries = {
        name: {key: value for key, value in entry.items() if key != "bytes"}
        for name, entry in index["entries"].items()
    }
    header = encode_header(tensors, {**index, "entries": entries})

    def write(path: Path) -> None:
        with open(path, "wb") as stream:
            stream.write(header)
            for part in parts:
                stream.write(part())

    planned = Planned(BUNDLE, index["basis_fingerprint"], frozenset(by_name))
    with replacing(folder, planned, overwrite=overwrite, needed=needed):
        write_aside(folder / BUNDLE_FILE, write)
    add_dependent(planned.basis, folder)
    made = open_bundle(folder)
    write_card(folder, made, shown_as)
    return made


def _index(packed: Sequence[Packed], old: Mapping[str, Any] | None) -> dict[str, Any]:
    """Sort the tasks into rows and those that lie apart, and gather what all have in common.

    An earlier bundle's index keeps its order of modules.
    """
    first = packed[0]
    modules = first.modules if old is None else old["modules"]
    common = first.config if old is None else old["config"]
    fingerprint = common["basis_fingerprint"]
    index: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "subspace_peft_version": __version__,
        "basis_fingerprint": fingerprint,
        "modules": modules,
        "config": common,
        "tasks": [],
        "apart": [],
        "entries": {},
    }
    for task in packed:
        if task.config["basis_fingerprint"] != fingerprint:
            raise BasisMismatchError(
                f"Task {task.name!r} is on the basis {task.config['basis_fingerprint']}, {first.name!r} and so the"
                f" bundle on {fingerprint}. Make a bundle of its own for it."
            )
        place = ("basis", "basis_revision")
        own = {**dict.fromkeys(common), **task.config}
        differs = {key: value for key, value in own.items() if key not in place and common.get(key) != value}
        source = task.entry.get("source")
        entry = {**task.entry, **({"source": _shared(source)} if isinstance(source, dict) else {})}
        if differs:
            entry["config"] = differs
        same = list(task.modules.items()) == list(modules.items())
        if not same:
            entry["modules"] = task.modules
        index["tasks" if same and len(task.tensors) == 1 else "apart"].append(task.name)
        index["entries"][task.name] = entry
    return index


def _shared(source: dict[str, Any]) -> dict[str, Any]:
    """Return a task's origin without the path of this machine: its last part, beside the sha256."""
    location = source.get("location")
    if source.get("revision") or not isinstance(location, str) or not (is_absolute(location) or "/" in location):
        return source
    there = is_absolute(location) or looks_like_path(location) or Path(location).exists()
    return {**source, "location": last_part(location)} if there else source


# -- packing ----------------------------------------------------------------------------------------------------------


@patient()
def _pack_all(
    tasks: Any,
    basis: Any,
    metrics: Mapping[str, Mapping[str, Any]] | None,
    id2label: Mapping[str, Mapping[int, str]] | None,
    dtype: torch.dtype,
    token: str | bool | None,
    progress: bool,
) -> list[Packed]:
    if dtype not in FLOAT_DTYPES:
        raise SubspaceError(f"dtype={dtype}: cores are stored as floats.")
    packed: dict[str, Packed] = {}
    for named in _bar(named_tasks(tasks, basis=basis, token=token), progress):
        if named.name in packed:
            raise SubspaceError(
                f"Two tasks are called {named.name!r} ({packed[named.name].entry['source'].get('location')} and "
                f"{named.source.get('location')}). Rename a folder, or give a mapping, name → task, in Python."
            )
        given = {"metrics": (metrics or {}).get(named.name), "id2label": (id2label or {}).get(named.name)}
        packed[named.name] = pack(named, dtype, **given)
    for what, known in (("metrics", metrics), ("id2label", id2label)):
        if unknown := sorted(set(known or {}) - set(packed)):
            raise SubspaceError(f"{what} are given for {unknown[0]!r}, but no task has that name.")
    return list(packed.values())


def _bar(tasks: Iterable[Named], progress: bool) -> Iterator[Named]:
    yield from progress_bar(tasks, desc="packing tasks", unit="task", shown=progress)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time write a folder: of two that add at once, the second adds to the first one's bundle."""
    import os

    try:
        import fcntl
    except ImportError:
        # this system has no such locks: the last of two writers wins, and its file is whole
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
