"""Open a bundle, many tasks on one basis in one file, and read a task without reading the rest."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..basis import SubspaceBasis
from ..basis.dependents import add_dependent
from ..errors import BadFileError, BasisMismatchError, SubspaceError
from ..hub import only_local, split_revision
from ..tasks.arguments import check_hub
from ..tasks.read import Parts, SavedTask
from ..tuner.config import SAVED_IF_SET, SubspaceConfig
from ..tuner.loaded_from import LoadedFrom
from .format import BUNDLE_FILE, DTYPES, TensorRange, parse_header, parse_length, width
from .store import FileBytes, HubBytes, on_hub

MOST_OPEN = 32


@dataclass(frozen=True)
class BundledTask:
    """An entry of a bundle's index.

    Attributes:
        name: The task's name in the bundle.
        sha256: Hash of the task's bytes.
        bytes: Number of the task's bytes.
        source: `location`, `revision` and `sha256` of the file it was made from, as far as known.
        metrics: Its scores, as they were given.
        id2label: Names of its classes by index, or None.
        modules_to_save: Modules that were trained whole and are stored with it, or None.
        residual_rank: Rank of the update that is added to the basis's part, 0 for none.
        energy_kept: Share of a projected LoRA's energy that the basis keeps, or None.
    """

    name: str
    sha256: str
    bytes: int
    source: dict[str, Any]
    metrics: dict[str, Any]
    id2label: dict[int, str] | None
    modules_to_save: list[str] | None
    residual_rank: int
    energy_kept: float | None


@dataclass(frozen=True, eq=False)
class Numbers:
    """The tensors of a task.

    Attributes:
        cores: Module → (k_out, k_in) float, in units of ΔW.
        extras: Further tensors by their key in the task's file.
        residual: Module → ``(B, A)``, (out, r) and (r, in) float, whose product is added to ``U core V``.
    """

    cores: dict[str, torch.Tensor]
    extras: dict[str, torch.Tensor] = field(default_factory=dict)
    residual: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


class Bundle(Mapping[str, BundledTask]):
    """A mapping from a task's name to its entry in the bundle's index; `read` gives its tensors.

    `open_bundle` makes it.

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

    def __iter__(self) -> Iterator[str]:
        return iter((*self._rows, *self._apart))

    def __len__(self) -> int:
        return len(self._rows) + len(self._apart)

    def __contains__(self, name: object) -> bool:
        return name in self._rows or name in self._apart

    def __repr__(self) -> str:
        return f"Bundle({len(self)} tasks on basis {self.fingerprint[:12]}…, {self.location})"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored cores."""
        return DTYPES[self.pieces["cores"].dtype]

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
            int(entry.get("residual_rank", 0)),
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

    def span(self, name: str) -> tuple[int, int]:
        """Return where a task's bytes begin and end in the file.

        Raises:
            BadFileError: They do not lie together.
        """
        if name in self._rows:
            cores = self.pieces["cores"]
            each = width(self.index["modules"]) * DTYPES[cores.dtype].itemsize
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

    def read(self, name: str) -> Numbers:
        """Read a task's tensors, verified; the basis is not needed.

        Raises:
            SubspaceError: The bundle has no such task.
            BadFileError: Its bytes are damaged, or hold NaN or infinite values.
        """
        data = self.raw(name)
        start, _ = self.span(name)
        numbers = Numbers({})
        if name in self._rows:
            cores = self.pieces["cores"]
            row = torch.frombuffer(bytearray(data), dtype=DTYPES[cores.dtype])
        else:
            row = torch.empty(0)
            sides: dict[str, dict[str, torch.Tensor]] = {}
            for key, piece in self._block(name).items():
                if key == "pad":
                    continue
                value = _tensor(data[piece.start - start : piece.end - start], piece)
                self._finite(name, key, value)
                kind, _, rest = key.partition("/")
                if kind == "core":
                    row = value
                elif kind == "extra":
                    numbers.extras[rest] = value
                else:
                    sides.setdefault(rest, {})[kind] = value
            numbers.residual.update({module: (pair["B"], pair["A"]) for module, pair in sides.items()})
        self._finite(name, "core", row)
        place = 0
        for module, (k_out, k_in) in self.sizes(name).items():
            numbers.cores[module] = row[place : place + k_out * k_in].view(k_in, k_out).T
            place += k_out * k_in
        return numbers

    def _finite(self, name: str, key: str, value: torch.Tensor) -> None:
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise BadFileError(
                f"{self.location}: {key} of task {name!r} holds NaN or infinite values. Leave it out, or train it"
                " again."
            )

    def config(self, name: str, basis: SubspaceBasis | str | Path | None = None) -> SubspaceConfig:
        """Make a task's configuration, with `core` coefficients.

        The basis is pinned by its fingerprint; the bundle and its commit are recorded.

        Args:
            name: The task.
            basis: The basis, its folder or its Hub id; by default the place that the bundle names.

        Raises:
            SubspaceError: The bundle has no such task.
            BadFileError: The index holds no configuration.
        """
        entry = self.entry(name)
        known = {each.name for each in dataclasses.fields(SubspaceConfig)}
        given = {**self.index["config"], **entry.get("config", {}), "basis_fingerprint": self.fingerprint}
        try:
            # the common configuration may have fields that are saved only where they are set
            unset = {key for key in SAVED_IF_SET if given.get(key) is None}
            config = SubspaceConfig(**{key: value for key, value in given.items() if key in known - unset})
        except (TypeError, AttributeError, ValueError) as error:
            raise BadFileError(f"{self.location}: the configuration of task {name!r} is damaged: {error}") from error
        config.bundle = {
            "location": self.location,
            "revision": self.revision,
            "task": name,
            "sha256": entry["sha256"],
        }
        config.loaded_from = LoadedFrom(self.near, self._token)
        config.card = config.card if isinstance(config.card, dict) else None
        return config if basis is None else config.on_basis(basis)

    def task(self, name: str, basis: SubspaceBasis | str | Path | None = None) -> SavedTask:
        """Read a task, find and verify its basis, and make it one that `export_lora` and other conversions take.

        Args:
            name: The task.
            basis: See `config`.

        Raises:
            SubspaceError: See `read`.
            BadFileError: See `read`.
            BasisNotFoundError: The basis cannot be found.
            BasisMismatchError: The basis is not that of this bundle, or the task does not fit it.
        """
        numbers, config = self.read(name), self.config(name, basis)
        found = config.resolve()
        if found is None:
            raise BadFileError(f"{self.location}: its index does not say which basis it is on. Make it again.")
        keys, shapes = {}, found.shapes()
        for module, core in numbers.cores.items():
            key = found.find(module)
            size = None if key is None else config.sizes.used(module, shapes[key]["k_out"], shapes[key]["k_in"])
            if key is None or size != tuple(core.shape):
                raise BasisMismatchError(
                    f"{self.location}: task {name!r} has a core {tuple(core.shape)} in module {module!r}, its basis "
                    f"{self.fingerprint} {size or 'nothing'}. The bundle was altered: fetch or make it again."
                )
            for side, (axis, part) in zip(numbers.residual.get(module, ()), ((0, "out"), (1, "in")), strict=False):
                if side.dim() != 2 or side.shape[axis] != shapes[key][part]:
                    raise BasisMismatchError(
                        f"{self.location}: task {name!r} has a residual {tuple(side.shape)} in module {module!r},"
                        f" whose {part} is {shapes[key][part]}. The bundle was altered: fetch or make it again."
                    )
            keys[module] = key
        cores = {module: core.double() for module, core in numbers.cores.items()}
        used = {module: tuple(core.shape) for module, core in cores.items()}
        return SavedTask(config, cores, Parts(used, found, keys), numbers.extras, numbers.residual)

    def verify(self) -> dict[str, str]:
        """Read every task, and return what is wrong with those that are damaged: name → message."""
        from tqdm.auto import tqdm

        wrong = {}
        for name in tqdm(self, desc="verifying", unit="task", delay=2):
            try:
                self.read(name)
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


def _tensor(data: bytes, piece: TensorRange) -> torch.Tensor:
    if not data:
        return torch.empty(piece.shape, dtype=DTYPES[piece.dtype])
    return torch.frombuffer(bytearray(data), dtype=DTYPES[piece.dtype]).view(piece.shape)


_opened: OrderedDict[tuple[Any, ...], Bundle] = OrderedDict()
_opening = threading.RLock()


def open_bundle(
    path_or_id: str | Path | Bundle,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Bundle:
    """Open a bundle by reading its header, which holds the index.

    A bundle that this process has open is not read again. A branch of the Hub therefore stays at the commit that was
    seen first, until `reopen_bundle`.

    Args:
        path_or_id: Folder of a bundle, its file, or a Hub id, with ``@revision`` if wanted.
        revision: Branch, tag or commit sha on the Hub.
        token: As in huggingface_hub.
        cache_dir: As in huggingface_hub.

    Raises:
        SubspaceError: There is no bundle at that place.
        BadFileError: It is truncated, damaged, of a newer format, or has a task whose name could not be a folder's.
    """
    if isinstance(path_or_id, Bundle):
        check_hub(path_or_id, {"revision": revision, "token": token, "cache_dir": cache_dir})
        return path_or_id
    check_hub(path_or_id, {"revision": revision})
    text = str(path_or_id)
    file = Path(text).expanduser()
    file = file / BUNDLE_FILE if file.is_dir() else file
    if file.is_file() or file.name == BUNDLE_FILE or only_local(text, revision):
        local, folder = FileBytes(file), file.parent.resolve()
        key: tuple[Any, ...] = (folder, file.name, local.state)
        if key not in _opened:
            made = Bundle(local, str(folder), folder, token)
            if file.name == BUNDLE_FILE:
                add_dependent(made.fingerprint, folder)
            return _known(key, lambda: made)
        return _known(key, lambda: Bundle(local, str(folder), folder, token))
    repo_id, at = split_revision(text)
    key = (repo_id, revision or at, token, None if cache_dir is None else str(cache_dir))
    return _known(key, lambda: Bundle(on_hub(repo_id, revision or at, token, cache_dir), repo_id, None, token))


def reopen_bundle(bundle: Bundle) -> Bundle:
    """Open a bundle again: a branch of the Hub may have moved on since this process opened it."""
    key = next((key for key, each in _opened.items() if each is bundle), None)
    if key is None or isinstance(bundle.store, FileBytes):
        return bundle
    del _opened[key]
    repo_id, revision, token, cache_dir = key
    return open_bundle(repo_id, revision=revision, token=token, cache_dir=cache_dir)


def _known(key: tuple[Any, ...], make: Callable[[], Bundle]) -> Bundle:
    with _opening:
        found = _opened.get(key)
        if found is None:
            found = _opened[key] = make()
        _opened.move_to_end(key)
        while len(_opened) > MOST_OPEN:
            _opened.popitem(last=False)
        return found
