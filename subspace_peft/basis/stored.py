"""A basis's files as they lie on the disk: found, opened and held against each other, without torch.

`files` makes tensors of them, `arrays` checks them where looking is all that is asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .._io.hints import hint
from .._io.untrusted import is_sha256, read_json
from .._version import __version__
from ..errors import BadFileError, BasisNotFoundError, DiskError, HubUnavailableError
from ..hub import download, only_local, split_revision
from ..hub_requests import refusal
from .layout import SCALES, STORED_AS, combine_digests
from .newer import upgrade_hint
from .schema import info_problem, shape_problem

CONFIG_FILE = "basis_config.json"
TENSORS_FILE = "basis.safetensors"
# keys of the config that are not part of `StoredBasis.info`
NOT_INFO = ("format_version", "modules", "fingerprint")
FORMAT_VERSIONS = (1, 2)  # 2: with a precision, which earlier readers do not know


@dataclass(frozen=True)
class StoredBasis:
    """A basis's folder: its config, and a header of tensors that fits it. No tensor is read yet.

    Attributes:
        file: the tensors' file.
        entries: module name → its entry in the config, ``{"shape", "sha256"}``.
        precision: what U and V are stored as, where it is not what they are given as.
        info: what the config says beside the modules: base model, builder and its arguments, sources.
        digests: module name → sha256 of its tensors as stored.
        location: folder or Hub id.
        revision: commit sha on the Hub, or None.
        fetched: whether the files were downloaded from the Hub, into huggingface_hub's cache.
    """

    file: Path
    entries: Mapping[str, Mapping[str, Any]]
    precision: str | None
    info: Mapping[str, Any]
    digests: Mapping[str, str]
    location: str
    revision: str | None = None
    fetched: bool = False

    @property
    def fingerprint(self) -> str:
        """The sha256 (hex) over the modules' names and digests."""
        return combine_digests(self.digests)

    def shapes(self) -> dict[str, dict[str, int]]:
        """Return the shapes that the config records."""
        return {name: dict(entry["shape"]) for name, entry in self.entries.items()}


def open_stored(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> StoredBasis:
    """Open the basis in a folder or on the Hub.

    Arguments and errors are those of `SubspaceBasis.from_pretrained`.
    """
    try:
        folder = Path(path_or_id).expanduser()
        there, holds = folder.exists(), (folder / CONFIG_FILE).is_file()
    except (OSError, RuntimeError, ValueError) as error:
        # a name too long for the disk, the home of an unknown user, a NUL: a task from elsewhere may say anything
        raise BasisNotFoundError(
            f"There is no folder {str(path_or_id)[:200]!r} ({error}). Pass the folder of a basis, or a Hub id like"
            " 'org/basis'."
        ) from error
    if holds:
        return read_stored(folder, location=str(folder.resolve()), revision=None)
    if there:
        raise BasisNotFoundError(
            f"{folder} holds no {CONFIG_FILE}: it is not a basis. Pass the folder of a basis, or build one with"
            f" `subspace-peft build ADAPTER… --out FOLDER`, into a folder of its own.{hint(folder)}"
        )
    text = str(path_or_id)
    if only_local(text, revision):
        raise BasisNotFoundError(
            f"There is no folder {text!r}. Pass the folder of a basis, a Hub id like 'org/basis' (or 'org/basis@main',"
            " which is no folder here), or build one with `subspace-peft build`."
        )
    text, at = split_revision(text)
    wanted = revision or at
    try:
        folder, sha = download(text, (CONFIG_FILE, TENSORS_FILE), revision=wanted, token=token, cache_dir=cache_dir)
    except (HubUnavailableError, DiskError):
        raise
    except (OSError, ValueError) as error:
        raise BasisNotFoundError(
            f"There is no folder {text!r}, and no basis could be fetched from the Hub under that id (revision "
            f"{wanted or 'main'}): {refusal(error, text, wanted)}"
        ) from error
    return replace(read_stored(folder, location=text, revision=sha), fetched=True)


def read_stored(folder: Path, *, location: str, revision: str | None) -> StoredBasis:
    """Read a basis's config and the header of its tensors, and hold them against each other.

    Args:
        folder: holds both files.
        location: folder or Hub id that the record names.
        revision: commit sha on the Hub that the record names, or None.

    Raises:
        BadFileError: the files are missing, truncated, malformed or altered, or do not belong together.
    """
    config_file, tensors_file = folder / CONFIG_FILE, folder / TENSORS_FILE
    try:
        config = read_json(config_file)
        modules, version = config["modules"], config["format_version"]
    except (OSError, ValueError, KeyError) as error:
        raise BadFileError(
            f"{config_file}: not a basis's config ({type(error).__name__}: {error}). Fetch or build it again."
        ) from error
    written_by = config.get("subspace_peft_version")
    # True counts as 1
    if isinstance(version, bool) or version not in FORMAT_VERSIONS:
        raise BadFileError(
            f"{config_file}: format version {str(version)[:40]}, and this subspace_peft {__version__} reads"
            f" {FORMAT_VERSIONS[0]} and {FORMAT_VERSIONS[1]}."
            f"{upgrade_hint(written_by, isinstance(version, int) and version > FORMAT_VERSIONS[1])}"
        )
    info = {key: value for key, value in config.items() if key not in NOT_INFO}
    hint = upgrade_hint(written_by) or " Fetch or build it again."
    problem = _modules_problem(modules) or info_problem(info)
    if problem is not None:
        raise BadFileError(f"{config_file}: not a basis's config: {problem}.{hint}")
    digests = {name: entry["sha256"] for name, entry in modules.items()}
    if combine_digests(digests) != config.get("fingerprint"):
        raise BadFileError(
            f"{config_file}: its modules' hashes do not add up to its fingerprint"
            f" {str(config.get('fingerprint'))[:64]}. The file was altered: fetch or build it again."
        )
    precision = (info.get("precision") or {}).get("stored")
    if (version == FORMAT_VERSIONS[1]) != (precision is not None):
        raise BadFileError(
            f"{config_file}: format version {version} {'without' if precision is None else 'with'} a precision. The"
            " file was altered: fetch or build it again."
        )
    check_header(tensors_file, modules, precision)
    # the working directory may be another by the time that a module is asked for
    return StoredBasis(tensors_file.absolute(), modules, precision, info, digests, location, revision)


def _modules_problem(modules: Any) -> str | None:
    if not isinstance(modules, dict) or not modules:
        return "it lists no modules"
    for name, entry in modules.items():
        if not isinstance(entry, dict) or not is_sha256(entry.get("sha256")):
            return f"module {str(name)[:80]!r} has no sha256"
        problem = shape_problem(name, entry.get("shape"))
        if problem is not None:
            return problem
    return None


def check_header(file: Path, modules: dict[str, dict[str, Any]], precision: str | None = None) -> None:
    """Check the header of the tensors' file against the config, before anything is allocated.

    Args:
        file: the tensors' file.
        modules: module name → its entry in the config, ``{"shape", "sha256"}``.
        precision: what U and V are stored as, where it is not what they are given as.

    Raises:
        BadFileError: the file cannot be read, or a tensor is missing or has another shape or dtype; names it.
    """
    if file.exists() and not file.is_file():
        raise BadFileError(f"{file}: it is not a regular file. Fetch or build the basis again.")
    try:
        with safe_open(file, framework="np") as tensors:
            keys = set(tensors.keys())
            for name, entry in modules.items():
                for key, size in _expected(entry["shape"], precision).items():
                    present = f"{name}.{key}" in keys
                    found = tensors.get_slice(f"{name}.{key}").get_shape() if present else None
                    if found is None and key not in ("U", "V", "G", *SCALES.values()):
                        continue
                    fits = found is not None and len(found) == len(size)
                    if not fits or any(n not in (None, m) for n, m in zip(size, found, strict=True)):
                        raise BadFileError(
                            f"{file}: module {name!r} has {key} of shape {found}, but {CONFIG_FILE} says {size}. The "
                            "two files do not belong together: fetch or build the basis again."
                        )
                    kind = _kind(key, precision)
                    if kind is not None and tensors.get_slice(f"{name}.{key}").get_dtype() != kind:
                        raise BadFileError(
                            f"{file}: module {name!r} has {key} of another dtype than {kind}, though {CONFIG_FILE}"
                            f" says {precision}. The two files do not belong together: fetch or build the basis again."
                        )
    except (SafetensorError, OSError) as error:
        raise BadFileError(
            f"{file}: cannot be read ({error}). The file is missing, truncated or not a safetensors file: fetch or"
            " build the basis again."
        ) from error


def check_sides(file: Path, name: str, tensors: Collection[str]) -> None:
    """Raise BadFileError if U or V is not among the names of a module's `tensors`."""
    if not {"U", "V"} <= set(tensors):
        raise BadFileError(f"{file}: module {name!r} has no U and V. The file is damaged: build it again.")


def check_digest(file: Path, name: str, digest: str, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise BadFileError if a module's tensors have another sha256, `digest`, than its entry in the config says."""
    said = entries[name]["sha256"]
    if digest != said:
        raise BadFileError(
            f"{file}: module {name!r} has sha256 {digest}, but {CONFIG_FILE} says {said}. The file "
            "was altered or damaged after it was written: fetch or build it again."
        )


def _expected(shape: dict[str, int], precision: str | None) -> dict[str, list[int | None]]:
    """Return the sizes that a module's tensors may have, by name; None in them stands for any length."""
    core = [shape["k_out"], shape["k_in"]]
    expected: dict[str, list[int | None]] = {
        "U": [shape["out"], shape["k_out"]],
        "V": [shape["k_in"], shape["in"]],
        "M": [*core],
        "core_rms": [*core],
        "cores": [None, *core],
        "spectrum_out": [None],
        "spectrum_in": [None],
    }
    if precision == "int8":
        expected |= {SCALES["U"]: [shape["k_out"]], SCALES["V"]: [shape["k_in"]]}
    return expected | ({"G": [shape["directions"], *core]} if shape.get("directions") else {})


def _kind(key: str, precision: str | None) -> str | None:
    """Return the dtype, in safetensors' words, that a tensor must have; None where any float will do."""
    if precision is None or key not in (*SCALES, *SCALES.values()):
        return None
    return "F32" if key in SCALES.values() else STORED_AS[precision]
