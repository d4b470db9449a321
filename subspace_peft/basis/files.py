"""A basis on disk: `basis_config.json` and `basis.safetensors`, see docs/reference/file-format.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .._io.atomic import write_all_aside
from .._moved import moved_name
from .._version import __version__
from ..errors import BadFileError, SubspaceError
from .layout import SCALES, TENSOR_NAMES, combine_digests
from .module import ModuleBasis
from .module_store import ModuleStore
from .precision import restored, stored_digest
from .stored import (
    CONFIG_FILE,
    FORMAT_VERSIONS,
    NOT_INFO,
    TENSORS_FILE,
    StoredBasis,
    check_digest,
    check_sides,
    open_stored,
    read_stored,
)


class FileModules(ModuleStore):
    """Modules of a basis file, read and verified one at a time, when they are asked for.

    Args:
        file: the tensors' file.
        entries: module name → its entry in the config, ``{"shape", "sha256"}``.
        precision: what U and V are stored as, where it is not what they are given as.
    """

    def __init__(self, file: Path, entries: Mapping[str, Mapping[str, Any]], precision: str | None = None) -> None:
        # the working directory may be another by the time that a module is asked for
        self.file: Path = file.absolute()
        self.entries = entries
        self.precision = precision

    def shapes(self) -> dict[str, dict[str, int]]:
        """Return the shapes that the config records."""
        return {name: dict(entry["shape"]) for name, entry in self.entries.items()}

    def __getitem__(self, name: str) -> ModuleBasis:
        return self._read(name)[1]

    def stored(self, name: str) -> Mapping[str, torch.Tensor]:
        """Return a module's tensors as they are in the file, by name; verified."""
        return self._read(name)[0]

    def _read(self, name: str) -> tuple[dict[str, torch.Tensor], ModuleBasis]:
        """Return a module's tensors as they are in the file, and the module that they stand for; verified."""
        names = TENSOR_NAMES if self.precision is None else (*TENSOR_NAMES, *SCALES.values())
        try:
            with safe_open(self.file, framework="pt", device="cpu") as tensors:
                keys = set(tensors.keys())
                present = {key: tensors.get_tensor(f"{name}.{key}") for key in names if f"{name}.{key}" in keys}
        except (SafetensorError, OSError, RuntimeError, AttributeError) as error:
            raise BadFileError(
                f"{self.file}: cannot be read ({error}). The file is damaged or incomplete: fetch or build it again."
            ) from error
        check_sides(self.file, name, present)
        try:
            module = ModuleBasis(**present) if self.precision is None else restored(present, self.precision, name)
            module.check(name)
        except SubspaceError as error:
            raise BadFileError(f"{self.file}: {error}") from None
        check_digest(self.file, name, stored_digest(present), self.entries)
        return present, module


@dataclass(frozen=True)
class BasisRecord:
    """The content of a basis's folder, and where it came from.

    Attributes:
        modules: the modules.
        info: what the config says beside the modules: base model, builder and its arguments, sources.
        digests: module name → sha256 of its tensors as stored.
        location: folder or Hub id; None for a basis in memory.
        revision: commit sha on the Hub, or None.
        fetched: whether the files were downloaded from the Hub, into huggingface_hub's cache.
    """

    modules: ModuleStore
    info: Mapping[str, Any]
    digests: Mapping[str, str]
    location: str | None = None
    revision: str | None = None
    fetched: bool = False

    @property
    def fingerprint(self) -> str:
        """The sha256 (hex) over the modules' names and digests."""
        return combine_digests(self.digests)


def write_basis(record: BasisRecord, folder: Path) -> Path:
    """Write a basis's config and tensors into `folder`.

    Both files are written aside and renamed one after the other once both are whole, so a failure leaves the earlier
    ones as they were.

    Returns:
        The folder's absolute path.

    Raises:
        SubspaceError: `folder` is a file.
        OSError: the disk refuses.
    """
    if folder.is_file():
        raise SubspaceError(f"{folder} is a file; a basis is saved into a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    entries: dict[str, Any] = {}
    modules, shapes = record.modules, record.modules.shapes()
    for name in modules:
        for key, value in modules.stored(name).items():
            tensors[f"{name}.{key}"] = value.detach().cpu().contiguous()
        entries[name] = {"shape": shapes[name], "sha256": record.digests[name]}
    fingerprint = record.fingerprint
    config = {
        "format_version": FORMAT_VERSIONS[0] if modules.precision is None else FORMAT_VERSIONS[1],
        "subspace_peft_version": __version__,
        "fingerprint": fingerprint,
        **{key: value for key, value in record.info.items() if key not in NOT_INFO},
        "modules": entries,
    }
    # one key only: safetensors writes several in an order that differs from process to process
    metadata = {"fingerprint": fingerprint}
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_all_aside(
        {
            folder / TENSORS_FILE: lambda path: save_file(tensors, path, metadata=metadata),
            folder / CONFIG_FILE: lambda path: path.write_text(text, encoding="utf-8"),
        }
    )
    return folder.resolve()


def open_basis(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> BasisRecord:
    """Open the basis in a folder or on the Hub.

    Arguments and errors are those of `SubspaceBasis.from_pretrained`.
    """
    return record_of(open_stored(path_or_id, revision=revision, token=token, cache_dir=cache_dir))


def read_folder(folder: Path, *, location: str, revision: str | None) -> BasisRecord:
    """Read a basis's config and the header of its tensors; arguments and errors are those of `read_stored`."""
    return record_of(read_stored(folder, location=location, revision=revision))


def record_of(stored: StoredBasis) -> BasisRecord:
    """Return a stored basis as a record, whose modules are read when they are asked for."""
    modules = FileModules(stored.file, stored.entries, stored.precision)
    return BasisRecord(modules, stored.info, stored.digests, stored.location, stored.revision, stored.fetched)


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
