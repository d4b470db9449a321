"""A basis on disk: `basis_config.json`, `basis.safetensors`, `README.md`. See docs/file-format.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .._io.atomic import write_all_aside
from .._io.untrusted import is_sha256, read_json
from .._version import __version__
from ..cards import Place, put_card
from ..errors import BadFileError, BasisNotFoundError, SubspaceError
from . import cache
from .basis import SubspaceBasis, combine_digests
from .card import card_of, place_of
from .lazy_modules import ByName
from .module import TENSOR_NAMES, ModuleBasis
from .precision import KINDS, PRECISIONS, SCALES, restored, stored_digest
from .reference import looks_like_path, split_revision
from .schema import info_problem, shape_problem

CONFIG_FILE = "basis_config.json"
TENSORS_FILE = "basis.safetensors"
FORMAT_VERSIONS = (1, 2)  # 2: with a precision, which earlier readers do not know


class LazyModules(ByName):
    """Modules of a basis file, read and verified one at a time."""

    def __init__(self, file: Path, modules: dict[str, dict[str, Any]], precision: str | None = None) -> None:
        self.file = file
        self.modules = modules
        self.precision = precision

    def shapes(self) -> dict[str, dict[str, int]]:
        return {name: dict(entry["shape"]) for name, entry in self.modules.items()}

    def __getitem__(self, name: str) -> ModuleBasis:
        return self._read(name)[1]

    def stored(self, name: str) -> Mapping[str, torch.Tensor]:
        return self._read(name)[0]

    def _read(self, name: str) -> tuple[dict[str, torch.Tensor], ModuleBasis]:
        """A module's tensors as they are in the file, and what they stand for; verified."""
        names = TENSOR_NAMES if self.precision is None else (*TENSOR_NAMES, *SCALES.values())
        try:
            with safe_open(self.file, framework="pt", device="cpu") as tensors:
                keys = set(tensors.keys())
                present = {key: tensors.get_tensor(f"{name}.{key}") for key in names if f"{name}.{key}" in keys}
        except (SafetensorError, OSError, RuntimeError, AttributeError) as error:
            raise BadFileError(
                f"{self.file}: cannot be read ({error}). The file is damaged or incomplete: fetch or build it again."
            ) from error
        if not {"U", "V"} <= present.keys():
            raise BadFileError(f"{self.file}: module {name!r} has no U and V. The file is damaged: build it again.")
        try:
            module = ModuleBasis(**present) if self.precision is None else restored(present, self.precision, name)
            module.check(name)
        except SubspaceError as error:
            raise BadFileError(f"{self.file}: {error}") from None
        digest, said = stored_digest(present), self.modules[name]["sha256"]
        if digest != said:
            raise BadFileError(
                f"{self.file}: module {name!r} has sha256 {digest}, but {CONFIG_FILE} says {said}. The file "
                "was altered or damaged after it was written: fetch or build it again."
            )
        return present, module


def write_basis(basis: SubspaceBasis, folder: Path, place: Place | None = None) -> Path:
    """Write `basis` into `folder`: both files aside, and only when both are whole, renamed one after the other. A card
    there, with what others wrote around it, is made anew; it says to load the basis from `place`, or from the folder.
    """
    if folder.is_file():
        raise SubspaceError(f"{folder} is a file; a basis is saved into a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    entries: dict[str, Any] = {}
    shapes = basis.shapes()
    for name in basis:
        for key, value in basis.stored(name).items():
            tensors[f"{name}.{key}"] = value.detach().cpu().contiguous()
        entries[name] = {"shape": shapes[name], "sha256": basis.digests[name]}
    config = {
        "format_version": FORMAT_VERSIONS[0] if basis.precision is None else FORMAT_VERSIONS[1],
        "subspace_peft_version": __version__,
        "fingerprint": basis.fingerprint,
        **{key: value for key, value in basis.info.items() if key not in ("format_version", "modules", "fingerprint")},
        "modules": entries,
    }
    # one key only: safetensors writes several in an order that differs from process to process
    metadata = {"fingerprint": basis.fingerprint}
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_all_aside(
        {
            folder / TENSORS_FILE: lambda path: save_file(tensors, path, metadata=metadata),
            folder / CONFIG_FILE: lambda path: path.write_text(text, encoding="utf-8"),
        }
    )
    put_card(folder, card_of(basis, place or place_of(folder)), only_ours=True)
    return folder.resolve()


def open_basis(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> SubspaceBasis:
    """Open the basis in a folder or on the Hub; see `SubspaceBasis.from_pretrained`."""
    try:
        folder = Path(path_or_id).expanduser()
        there, holds = folder.exists(), (folder / CONFIG_FILE).is_file()
    except (OSError, RuntimeError, ValueError) as error:
        # a name too long for the disk, a home of nobody, a NUL: what a task from elsewhere may say
        raise BasisNotFoundError(
            f"There is no folder {str(path_or_id)[:200]!r} ({error}). Pass the folder of a basis, or a Hub id like"
            " 'org/basis'."
        ) from error
    if holds:
        return read_folder(folder, location=str(folder.resolve()), revision=None)
    if there:
        raise BasisNotFoundError(
            f"{folder} holds no {CONFIG_FILE}: it is not a basis. Build one with `subspace-peft build ADAPTER… --out "
            f"{folder}`, or pass the folder of a basis."
        )
    text = str(path_or_id)
    if looks_like_path(text):
        raise BasisNotFoundError(
            f"There is no folder {text!r}. Pass the folder of a basis, a Hub id like 'org/basis', or build one with "
            "`subspace-peft build`."
        )
    text, at = split_revision(text)
    folder, sha = download(text, revision or at, token, cache_dir)
    basis = read_folder(folder, location=text, revision=sha)
    cache.keep(basis, folder)
    return basis


def download(
    repo_id: str, revision: str | None, token: str | bool | None, cache_dir: str | Path | None
) -> tuple[Path, str | None]:
    """Fetch a basis's two files from the Hub into huggingface_hub's cache; returns their folder and the commit sha."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    common = {"repo_id": repo_id, "revision": revision, "token": token, "cache_dir": cache_dir}
    try:
        config = Path(hf_hub_download(filename=CONFIG_FILE, **common))
        # the snapshot's folder is the commit: asking for the tensors at that sha cannot mix two revisions
        sha = config.parent.name if config.parent.parent.name == "snapshots" else None
        hf_hub_download(filename=TENSORS_FILE, **{**common, "revision": sha or revision})
    except (OSError, HFValidationError, ValueError) as error:
        raise BasisNotFoundError(
            f"There is no folder {repo_id!r}, and no basis could be fetched from the Hub under that id (revision "
            f"{revision or 'main'}): {error}"
        ) from error
    return config.parent, sha


def read_folder(folder: Path, *, location: str, revision: str | None) -> SubspaceBasis:
    config_file, tensors_file = folder / CONFIG_FILE, folder / TENSORS_FILE
    try:
        config = read_json(config_file)
        modules, version = config["modules"], config["format_version"]
    except (OSError, ValueError, KeyError) as error:
        raise BadFileError(
            f"{config_file}: not a basis's config ({type(error).__name__}: {error}). Fetch or build it again."
        ) from error
    # True counts as 1
    if isinstance(version, bool) or version not in FORMAT_VERSIONS:
        raise BadFileError(
            f"{config_file}: format version {str(version)[:40]}, and this subspace_peft {__version__} reads"
            f" {FORMAT_VERSIONS[0]} and {FORMAT_VERSIONS[1]}. Upgrade with `pip install -U subspace-peft`."
        )
    info = {key: value for key, value in config.items() if key not in ("modules", "fingerprint", "format_version")}
    problem = _modules_problem(modules) or info_problem(info)
    if problem is not None:
        raise BadFileError(f"{config_file}: not a basis's config: {problem}. Fetch or build it again.")
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
    lazy = LazyModules(tensors_file, modules, precision)
    return SubspaceBasis(lazy, info, location=location, revision=revision, digests=digests)


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
    """Hold the tensors file's header against the config before anything is allocated."""
    if file.exists() and not file.is_file():
        raise BadFileError(f"{file}: it is no regular file. Fetch or build the basis again.")
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            keys = set(tensors.keys())
            for name, entry in modules.items():
                for key, size in _expected(entry["shape"], precision).items():
                    present = f"{name}.{key}" in keys
                    found = tensors.get_slice(f"{name}.{key}").get_shape() if present else None
                    if found is None and key not in ("U", "V", "G", *SCALES.values()):
                        continue
                    # None stands for any length, of a list of cores or of a spectrum
                    fits = found is not None and len(found) == len(size)
                    if not fits or any(n not in (None, m) for n, m in zip(size, found, strict=True)):
                        raise BadFileError(
                            f"{file}: module {name!r} has {key} of shape {found}, but {CONFIG_FILE} says {size}. The "
                            "two files do not belong together: fetch or build the basis again."
                        )
                    kind = _kind(key, precision)
                    if kind is not None and tensors.get_slice(f"{name}.{key}").get_dtype() != kind:
                        raise BadFileError(
                            f"{file}: module {name!r} has {key} of another dtype than {kind}, and {CONFIG_FILE} says"
                            f" {precision}. The two files do not belong together: fetch or build the basis again."
                        )
    except (SafetensorError, OSError) as error:
        raise BadFileError(
            f"{file}: cannot be read ({error}). The file is missing, truncated or no safetensors file: fetch or build "
            "the basis again."
        ) from error


def _expected(shape: dict[str, int], precision: str | None) -> dict[str, list[int | None]]:
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
    """The dtype, in safetensors' word, that a tensor has to have; None where any float will do."""
    if precision is None or key not in (*SCALES, *SCALES.values()):
        return None
    return "F32" if key in SCALES.values() else KINDS[PRECISIONS[precision]]
