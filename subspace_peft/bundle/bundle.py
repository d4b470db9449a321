"""Open a bundle, many tasks on one basis in one file, and read a task without reading the rest."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .._shown import Shown, Table, core_table
from ..basis import SubspaceBasis
from ..basis.dependents import add_dependent
from ..errors import BadFileError, BasisMismatchError
from ..tasks.arguments import check_hub
from ..tasks.read import Parts, SavedTask
from ..tuner.config import SAVED_IF_SET, SubspaceConfig
from ..tuner.loaded_from import LoadedFrom
from .dtypes import DTYPES
from .format import BUNDLE_FILE, TensorRange
from .index import BundledTask as BundledTask
from .index import BundleIndex, place_of
from .store import FileBytes, on_hub

MOST_OPEN = 32


@dataclass(frozen=True, eq=False, repr=False)
class Numbers(Shown):
    """The tensors of a task.

    Attributes:
        cores: Module → (k_out, k_in) float, in units of ΔW.
        extras: Further tensors by their key in the task's file.
        own: Module → ``(B, A)``, (out, φ) and (φ, in) float, whose product is added to ``U core V``: the task's own
            directions.
    """

    cores: dict[str, torch.Tensor]
    extras: dict[str, torch.Tensor] = field(default_factory=dict)
    own: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def residual(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The earlier name of `own`."""
        warnings.warn("The residual of a bundle's task is now called own.", FutureWarning, stacklevel=2)
        return self.own

    def _shown_facts(self) -> Iterator[tuple[str, Any]]:
        yield "modules", len(self.cores)
        yield "parameters", f"{sum(core.numel() for core in self.cores.values()):,}"
        yield "further tensors", len(self.extras) or None
        yield "modules with own directions", len(self.own) or None

    def _shown_table(self) -> Table:
        return core_table(self.cores)


class Bundle(BundleIndex):
    """A mapping from a task's name to its entry in the bundle's index; `read` gives its tensors.

    `open_bundle` makes it.

    Attributes:
        location: Folder or Hub id.
        revision: Commit sha on the Hub, or None.
        fingerprint: Fingerprint of the basis of all tasks.
        base_model: The base model of all tasks, or None.
    """

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored cores."""
        return DTYPES[self.pieces["cores"].dtype]

    # -- reading ------------------------------------------------------------------------------------------------------

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
            numbers.own.update({module: (pair["B"], pair["A"]) for module, pair in sides.items()})
        self._finite(name, "core", row)
        place = 0
        for module, (k_out, k_in) in self.sizes(name).items():
            numbers.cores[module] = row[place : place + k_out * k_in].view(k_in, k_out).T
            place += k_out * k_in
        return numbers

    def _finite(self, name: str, key: str, value: torch.Tensor) -> None:
        self.check_finite(name, key, not value.is_floating_point() or bool(torch.isfinite(value).all()))

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
        # of residuals, as earlier versions stored them, a configuration says nothing
        for key, value in config.sizes.fields_of_own(self.own_directions(name)).items():
            setattr(config, key, value)
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
            own = numbers.own.get(module, ())
            for side, (axis, part) in zip(own, ((0, "out"), (1, "in")), strict=False):
                if side.shape[axis] != shapes[key][part] or min(side.shape) < side.shape[1 - axis]:
                    raise BasisMismatchError(
                        f"{self.location}: task {name!r} has own directions {tuple(side.shape)} in module {module!r},"
                        f" whose {part} is {shapes[key][part]}. The bundle was altered: fetch or make it again."
                    )
            keys[module] = key
        cores = {module: core.double() for module, core in numbers.cores.items()}
        used = {module: tuple(core.shape) for module, core in cores.items()}
        directions = {module: (B.double(), A.double()) for module, (B, A) in numbers.own.items()}
        return SavedTask(config, cores, Parts(used, found, keys), numbers.extras, directions)


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
    file, repo_id, at = place_of(path_or_id, revision)
    if file is not None:
        local, folder = FileBytes(file), file.parent.resolve()
        key: tuple[Any, ...] = (folder, file.name, local.state)
        if key not in _opened:
            made = Bundle(local, str(folder), folder, token)
            if file.name == BUNDLE_FILE:
                add_dependent(made.fingerprint, folder)
            return _known(key, lambda: made)
        return _known(key, lambda: Bundle(local, str(folder), folder, token))
    key = (repo_id, at, token, None if cache_dir is None else str(cache_dir))
    return _known(key, lambda: Bundle(on_hub(repo_id, at, token, cache_dir), repo_id, None, token))


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
