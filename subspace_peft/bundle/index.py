"""The index of a bundle: which tasks are in it, where their bytes lie, and whether these are whole; without torch."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._shown import Shown, Table, fingerprint, short, size
from ..basis.dependents import add_dependent
from ..energy import percent
from ..errors import BadFileError, SubspaceError
from ..hub import only_local, split_revision
from .format import BUNDLE_FILE, ITEM_SIZES, TensorRange, parse_header, parse_length, width
from .store import FileBytes, HubBytes, on_hub


@dataclass(frozen=True, repr=False)
class BundledTask(Shown):
    """An entry of a bundle's index.

    Attributes:
        name: The task's name in the bundle.
        sha256: Hash of the task's bytes.
        bytes: Number of the task's bytes.
        source: `location`, `revision` and `sha256` of the file it was made from, as far as known.
        metrics: Its scores, as they were given.
        id2label: Names of its classes by index, or None.
        modules_to_save: Modules that were trained whole and are stored with it, or None.
        extra_rank: The most directions of its own beside the basis that it has in a module, 0 for none.
        energy_kept: Share of a projected LoRA's energy that the basis keeps, or None.
    """

    name: str
    sha256: str
    bytes: int
    source: dict[str, Any]
    metrics: dict[str, Any]
    id2label: dict[int, str] | None
    modules_to_save: list[str] | None
    extra_rank: int
    energy_kept: float | None

    @property
    def residual_rank(self) -> int:
        """The earlier name of `extra_rank`."""
        warnings.warn("BundledTask.residual_rank is now called extra_rank.", FutureWarning, stacklevel=2)
        return self.extra_rank

    def _shown_facts(self) -> Iterator[tuple[str, Any]]:
        yield "name", repr(self.name)
        yield "size", size(self.bytes)
        yield "energy kept", None if self.energy_kept is None else percent(self.energy_kept)
        yield "own directions per module", self.extra_rank or None
        yield "metrics", short(self.metrics) if self.metrics else None
        yield "trained whole", ", ".join(self.modules_to_save or ()) or None
        yield "sha256", fingerprint(self.sha256)


class BundleIndex(Shown, Mapping[str, BundledTask]):
    """A mapping from a task's name to its entry in the bundle's index.

    `open_index` makes it. ``len(bundle)`` is how many tasks it has, ``name in bundle`` asks for one, and iteration
    gives their names; none of these reads a task's bytes.

    Attributes:
        location: Folder or Hub id.
        revision: Commit sha on the Hub, or None.
        fingerprint: Fingerprint of the basis of all tasks.
        base_model: The base model of all tasks, or None.
    """

    def __init__(
        self, store: FileBytes | HubBytes, location: str, near: Path | None, token: str | bool | None
    ) -> None:
        self.store, self.location, self.revision = store, location, store.revision
        self.near, self._token = near, token
        length = parse_length(store.read(0, min(8, store.size)), store.size, location)
        self.pieces, self.index = parse_header(store.read(8, 8 + length), store.size, location)
        self._rows = {name: number for number, name in enumerate(self.index["tasks"])}
        self._apart = {name: number for number, name in enumerate(self.index["apart"])}
        self._blocks: dict[int, dict[str, TensorRange]] = {}
        for key, piece in self.pieces.items():
            number, slash, rest = key.partition("/")
            if slash and number.isdecimal():
                self._blocks.setdefault(int(number), {})[rest] = piece
        self.fingerprint: str = self.index["basis_fingerprint"]
        self.base_model: str | None = self.index["config"].get("base_model_name_or_path")

    def _shown_facts(self) -> Iterator[tuple[str, Any]]:
        yield "tasks", len(self)
        yield "base model", short(self.base_model)
        yield "size", size(self.store.size)
        yield "basis", fingerprint(self.fingerprint)
        yield "at", short(self.location) + (f"@{self.revision[:7]}" if self.revision else "")

    def _shown_table(self) -> Table:
        rows = (
            (task.name, size(task.bytes), "" if task.energy_kept is None else percent(task.energy_kept))
            for task in self.values()
        )
        return ("task", "size", "energy kept"), rows, len(self)

    def __iter__(self) -> Iterator[str]:
        return iter((*self._rows, *self._apart))

    def __len__(self) -> int:
        return len(self._rows) + len(self._apart)

    def __contains__(self, name: object) -> bool:
        return name in self._rows or name in self._apart

    def __getitem__(self, name: str) -> BundledTask:
        entry = self.entry(name)
        config = {**self.index["config"], **entry.get("config", {})}
        labels = config.get("id2label")
        start, end = self.span(name)
        return BundledTask(
            name,
            entry["sha256"],
            end - start,
            entry.get("source", {}),
            entry.get("metrics", {}),
            None if labels is None else {int(index): str(label) for index, label in labels.items()},
            config.get("modules_to_save"),
            max(self.own_directions(name).values(), default=0),
            entry.get("energy_kept"),
        )

    def entry(self, name: str) -> dict[str, Any]:
        """Return the index's own entry of a task.

        Raises:
            SubspaceError: The bundle has no task of that name.
        """
        if name not in self:
            near = sorted(str(each) for each in self)[:5]
            raise SubspaceError(
                f"{self.location}: there is no task {name!r} among its {len(self)}, such as"
                f" {', '.join(near) or '(none)'}. `subspace-peft bundle ls {self.location}` lists them."
            )
        return self.index["entries"][name]

    def sizes(self, name: str) -> dict[str, tuple[int, int]]:
        """Return the size of a task's core per module: module → (k_out, k_in)."""
        return {module: (a, b) for module, (a, b) in self.entry(name).get("modules", self.index["modules"]).items()}

    def own_directions(self, name: str) -> dict[str, int]:
        """Return how many directions of its own a task has per module."""
        if name in self._rows:
            return dict.fromkeys(self.sizes(name), 0)
        block = self._block(name)
        found = {key.removeprefix("A/"): piece.shape[0] for key, piece in block.items() if key.startswith("A/")}
        return {module: found.get(module, 0) for module in self.sizes(name)}

    def names_own(self, name: str) -> bool:
        """Return whether a task's configuration names its own directions: earlier versions stored residuals."""
        config = {**self.index["config"], **self.entry(name).get("config", {})}
        return bool(config.get("extra_rank") or config.get("extra_rank_pattern"))

    def span(self, name: str) -> tuple[int, int]:
        """Return where a task's bytes begin and end in the file.

        Raises:
            BadFileError: They do not lie together.
        """
        if name in self._rows:
            cores = self.pieces["cores"]
            each = width(self.index["modules"]) * ITEM_SIZES[cores.dtype]
            return cores.start + self._rows[name] * each, cores.start + (self._rows[name] + 1) * each
        block = [piece for key, piece in self._block(name).items() if key != "pad"]
        start, end = min(piece.start for piece in block), max(piece.end for piece in block)
        if sum(piece.end - piece.start for piece in block) != end - start:
            raise BadFileError(f"{self.location}: the tensors of task {name!r} do not lie together. Make it again.")
        return start, end

    def _block(self, name: str) -> dict[str, TensorRange]:
        return self._blocks[self._apart[name]]

    def tensors(self, name: str) -> list[tuple[str, str, tuple[int, ...]]]:
        """Return key, dtype and shape of a task's tensors, in the order of its bytes."""
        if name in self._rows:
            return [("core", self.pieces["cores"].dtype, (width(self.sizes(name)),))]
        block = sorted(self._block(name).items(), key=lambda item: (item[1].start, item[1].end))
        return [(key, piece.dtype, piece.shape) for key, piece in block if key != "pad"]

    # -- reading ------------------------------------------------------------------------------------------------------

    def raw(self, name: str) -> bytes:
        """Read a task's bytes and check their hash: from the Hub in one request, and nothing else of the file.

        Raises:
            BadFileError: They are missing, or they are not those that were packed.
        """
        entry = self.entry(name)
        data = self.store.read(*self.span(name))
        found = hashlib.sha256(data).hexdigest()
        if found != entry["sha256"]:
            raise BadFileError(
                f"{self.location}: task {name!r} has sha256 {found}, but the index says {entry['sha256']}. The file"
                " was altered or damaged after it was written: fetch the bundle again, or replace the task in it."
            )
        return data

    def check(self, name: str) -> None:
        """Read a task's bytes, and check their hash and that all values are finite.

        Raises:
            BadFileError: They are damaged, or hold NaN or infinite values.
        """
        import numpy as np

        from ..basis.arrays import array_of

        data = self.raw(name)
        start, _ = self.span(name)
        if name in self._rows:
            pieces = [("core", self.pieces["cores"].dtype, data)]
        else:
            block = self._block(name).items()
            pieces = [(key, each.dtype, data[each.start - start : each.end - start]) for key, each in block]
        for key, kind, part in pieces:
            if key != "pad" and kind in ("F64", "F32", "F16", "BF16"):
                self.check_finite(name, key, bool(np.isfinite(array_of((kind, (-1,), part))).all()))

    def check_finite(self, name: str, key: str, finite: bool) -> None:
        """Raise `BadFileError` where the values of a task's tensor are not all finite."""
        if not finite:
            raise BadFileError(
                f"{self.location}: {key} of task {name!r} holds NaN or infinite values. Leave it out, or train it"
                " again."
            )

    def verify(self, progress: bool = True) -> dict[str, str]:
        """Read every task, and return what is wrong with those that are damaged: name → message.

        Args:
            progress: Show a bar where that takes over two seconds.
        """
        from .._io.progress import progress_bar

        wrong = {}
        for name in progress_bar(self, desc="verifying", unit="task", shown=progress):
            try:
                self.check(name)
            except BadFileError as error:
                wrong[name] = str(error)
        return wrong

    def download(self) -> Path:
        """Fetch the whole file into huggingface_hub's cache, where it is on the Hub.

        `TaskBank.load` takes the file; a machine that goes offline keeps it.

        Returns:
            The file on this machine.

        Raises:
            SubspaceError: It cannot be fetched.
        """
        return self.store.local()


def open_index(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> BundleIndex:
    """Open a bundle to look at it, by reading its header; arguments and errors are those of `open_bundle`."""
    file, repo_id, at = place_of(path_or_id, revision)
    if file is None:
        return BundleIndex(on_hub(repo_id, at, token, cache_dir), repo_id, None, token)
    folder = file.parent.resolve()
    made = BundleIndex(FileBytes(file), str(folder), folder, token)
    if file.name == BUNDLE_FILE:
        add_dependent(made.fingerprint, folder)
    return made


def place_of(path_or_id: str | Path, revision: str | None) -> tuple[Path | None, str, str | None]:
    """Return the file of a bundle on this machine, or None; then the Hub id and the revision."""
    text = str(path_or_id)
    file = Path(text).expanduser()
    file = file / BUNDLE_FILE if file.is_dir() else file
    if file.is_file() or file.name == BUNDLE_FILE or only_local(text, revision):
        return file, "", None
    repo_id, at = split_revision(text)
    return None, repo_id, revision or at
