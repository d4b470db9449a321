"""A saved task's tensors, held against its config and its basis before any model is touched."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from .._io.untrusted import is_name
from ..basis import ModuleBasis
from ..basis.module import FLOAT_DTYPES, tensor_sha256
from ..errors import BadFileError, BasisMismatchError, SubspaceError
from .coefficients import default_scale, make_coefficients

if TYPE_CHECKING:
    from .config import SubspaceConfig

Shapes = dict[str, dict[str, tuple[int, ...]]]
WEIGHTS_FILE = "adapter_model.safetensors"
COEFFICIENT_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.subspace_coef\.(?P<name>[a-z]+)$")
BASIS_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.subspace_(?P<name>[UVMG])$")


def locate_task(path_or_id: str, subfolder: str | None, kwargs: Mapping[str, Any]) -> tuple[Path | None, Path | None]:
    """Folder and weights' file of a task on this machine or in the Hub's cache; None for what is not there."""
    folder = Path(path_or_id, subfolder or "")
    if folder.is_dir():
        weights = folder / WEIGHTS_FILE
        return folder, weights if weights.is_file() else None
    from huggingface_hub import hf_hub_download

    wanted = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
    try:
        weights = Path(hf_hub_download(path_or_id, WEIGHTS_FILE, subfolder=subfolder, **wanted))
    except (OSError, ValueError):
        # PEFT looks for other file names after this, and says so itself where there is none
        return None, None
    return weights.parent, weights


def weights_of(task: Any, config: SubspaceConfig) -> Path:
    """The file of a loaded task's tensors. Raises `SubspaceError` where there is none that can be read without
    unpickling."""
    folder = config._near if config._near is not None else Path(str(task))
    file = folder / WEIGHTS_FILE
    if file.is_file():
        return file
    pickled = folder / "adapter_model.bin"
    if pickled.is_file():
        raise SubspaceError(
            f"{task}: there is only {pickled.name}, which would have to be unpickled. Load it with"
            " `PeftModel.from_pretrained`, if you trust it, and save it again: PEFT writes safetensors."
        )
    raise SubspaceError(f"{task}: there is no {WEIGHTS_FILE}. Pass the folder or Hub id of a saved task.")


def check_task(file: Path, config: SubspaceConfig) -> frozenset[str]:
    """Check a task's weights file.

    Returns:
        Names of the modules that have coefficients in it.

    Raises:
        BadFileError: truncated or malformed, a wrong dtype, non-finite numbers, no coefficients, missing parts.
        BasisNotFoundError, BasisMismatchError: the basis is nowhere or another one; shapes do not fit it.
    """
    if file.exists() and not file.is_file():
        raise BadFileError(f"{file}: it is no regular file. Fetch or save the task again.")
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            shapes, carried = _read_header(file, tensors)
            if config.basis_modules is not None:
                _check_carried(file, config, carried)
            _check_shapes(file, config, shapes)
            # the header fits: only now is anything read
            for key in tensors.keys():  # noqa: SIM118  no iterator of its own
                _check_numbers(file, config, key, tensors.get_tensor(key))
    except (SafetensorError, OSError, RuntimeError, AttributeError) as error:
        raise BadFileError(
            f"{file}: cannot be read ({error}). It is truncated or no safetensors file: fetch or save the task again."
        ) from error
    return frozenset(shapes)


def _read_header(file: Path, tensors: Any) -> tuple[Shapes, Shapes]:
    """Module → name → shape: of the coefficients, and of a basis that the file carries."""
    shapes: Shapes = {}
    carried: Shapes = {}
    for key in tensors.keys():  # noqa: SIM118
        piece = tensors.get_slice(key)
        found, own = COEFFICIENT_KEY.match(key), BASIS_KEY.match(key)
        match = found or own
        if match is None:
            continue
        if piece.get_dtype() not in FLOAT_DTYPES.values():
            raise BadFileError(
                f"{file}: {key} has dtype {piece.get_dtype()}; coefficients are floats. Fetch or save the task again."
            )
        if not is_name(match["module"]):
            raise BadFileError(f"{file}: {key[:80]!r} names no module. Fetch or save the task again.")
        parts = (shapes if found else carried).setdefault(match["module"], {})
        if match["name"] in parts:
            raise BadFileError(
                f"{file}: {key} is there twice, with and without a prefix. Fetch or save the task again."
            )
        parts[match["name"]] = tuple(piece.get_shape())
    if not shapes:
        raise BadFileError(f"{file}: no coefficients inside. It is not a subspace task, or it was saved empty.")
    return shapes, carried


def _check_carried(file: Path, config: SubspaceConfig, carried: Shapes) -> None:
    """Hold the shapes of the basis that a self-contained task carries against its config."""
    wanted = {
        module: {name: _carried_shape(name, entry["shape"]) for name in entry["sha256"]}
        for module, entry in (config.basis_modules or {}).items()
    }
    for module in {**wanted, **carried}:
        expected, found = wanted.get(module, {}), carried.get(module, {})
        missing = sorted(expected.keys() - found.keys())
        if missing:
            raise BadFileError(
                f"{file}: the task carries its own basis, but subspace_{missing[0]} of module {module!r} is missing."
                " The file is incomplete: fetch or save the task again."
            )
        if found != expected:
            raise BadFileError(
                f"{file}: module {module!r} carries a basis of the shapes {found}, but the task's config says"
                f" {expected}. The two do not belong together: fetch or save the task again."
            )


def _carried_shape(name: str, shape: Mapping[str, int]) -> tuple[int, ...]:
    core = shape["k_out"], shape["k_in"]
    return {
        "U": (shape["out"], core[0]),
        "V": (core[1], shape["in"]),
        "M": core,
        "G": (shape.get("directions", 0), *core),
    }[name]


def _check_shapes(file: Path, config: SubspaceConfig, shapes: Shapes) -> None:
    """Hold the coefficients' shapes against the basis, which is found for that."""
    if config.basis_fingerprint is None and config.basis_modules is None and not config._given:
        raise BadFileError(
            f"{file}: the task's config does not say which basis it was trained on (basis_fingerprint), so none can be"
            " held against it. Fetch or save the task again, or pass the basis yourself."
        )
    basis = config.resolve()
    known = config.basis_modules if basis is None else basis.shapes()
    for module, parts in shapes.items():
        name = basis.find(module) if basis is not None else (module if module in (known or {}) else None)
        if name is None or known is None:
            raise BasisMismatchError(
                f"{file}: it has coefficients for module {module!r}, which the basis "
                f"{config.basis_fingerprint or ''} does not have. Pass the basis that the task was trained on."
            )
        shape = known[name] if basis is not None else known[name]["shape"]
        if config.coefficients == "directions" and not shape.get("directions"):
            raise BasisMismatchError(
                f"{file}: 'directions' coefficients, but the basis has no directions in module {name!r}. Pass the"
                " basis that the task was trained on."
            )
        expected = expected_shapes(config, module, shape)
        if parts != expected:
            raise BasisMismatchError(
                f"{file}: module {module!r} has coefficients {parts}, but {config.coefficients!r} coefficients in this"
                f" basis (k_out={shape['k_out']}, k_in={shape['k_in']}) are {expected}. The config, the weights and"
                " the basis do not belong together: fetch the task again, or pass the basis it was trained on."
            )


def _check_numbers(file: Path, config: SubspaceConfig, key: str, value: torch.Tensor) -> None:
    """Whether all numbers are finite; and, of a basis that the file carries, what their config says they hash to."""
    if value.is_floating_point() and value.dtype not in FLOAT_DTYPES:
        raise BadFileError(
            f"{file}: {key} has dtype {value.dtype}, which no task is saved in. Fetch or save the task again."
        )
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise BadFileError(
            f"{file}: {key} holds NaN or infinite values. The task's training diverged, or the file is "
            "damaged: fetch or train it again."
        )
    carried = BASIS_KEY.match(key)
    # a file saved after model.half() holds other bytes than were hashed: only finiteness can be held there
    if carried is None or config.basis_modules is None or value.dtype != torch.float32:
        return
    sha256 = config.basis_modules[carried["module"]]["sha256"][carried["name"]]
    if tensor_sha256(value) != sha256:
        raise BadFileError(
            f"{file}: subspace_{carried['name']} of module {carried['module']!r} has sha256 {tensor_sha256(value)},"
            f" but the task's config says {sha256}: the basis in this file is not the one the task was trained on."
            " Fetch or save the task again."
        )


def expected_shapes(config: SubspaceConfig, name: str, shape: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the trained tensors of the module `name`, for a basis module of the given sizes."""
    k_out, k_in = used_size(config, name, shape["k_out"], shape["k_in"])
    r = min(config.r, k_out, k_in)
    expected: dict[str, tuple[int, ...]] = {
        "core": {"weight": (k_out, k_in)},
        "factor": {"up": (k_out, r), "down": (r, k_in)},
        "diagonal": {"weight": (min(k_out, k_in),)},
        "directions": {"weight": (shape.get("directions", 0),)},
        "none": {},
    }[config.coefficients]
    return expected | ({"gain": (1,)} if config.mean_gain == "trainable" else {})


def scale_of(config: SubspaceConfig, name: str, shape: Mapping[str, int]) -> float:
    """s of the module `name`, for a basis module of the given sizes."""
    k_out, k_in = used_size(config, name, shape["k_out"], shape["k_in"])
    directions = shape.get("directions", 0)
    return _scale(config.alpha, config.coefficients, k_out, k_in, config.r, directions, config.mean_gain)


@functools.lru_cache(maxsize=4096)
def _scale(alpha: float, kind: str, k_out: int, k_in: int, r: int, directions: int, mean_gain: str) -> float:
    return default_scale(alpha, make_coefficients(kind, k_out, k_in, r=r, directions=directions, mean_gain=mean_gain))


def k_of(config: SubspaceConfig, name: str) -> int | None:
    """The k that the config asks for in the module `name`; None: all that the basis has."""
    return config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.k)


def used_size(config: SubspaceConfig, name: str, k_out: int, k_in: int) -> tuple[int, int]:
    """(k_out, k_in) that the config uses of a basis module: the leading k of each side, or all."""
    k = k_of(config, name)
    return (k_out, k_in) if k is None else (min(k, k_out), min(k, k_in))


def used_part(config: SubspaceConfig, name: str, module: ModuleBasis) -> ModuleBasis:
    """The part of a basis module that the config uses in the module `name`."""
    size = used_size(config, name, module.k_out, module.k_in)
    return module if size == (module.k_out, module.k_in) else module.truncate(*size)
