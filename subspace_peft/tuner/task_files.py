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

from ..basis import ModuleBasis
from ..basis.module import FLOAT_DTYPES, tensor_sha256
from ..errors import BadFileError, BasisMismatchError
from .coefficients import default_scale, make_coefficients

if TYPE_CHECKING:
    from .config import SubspaceConfig

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


def check_task(file: Path, config: SubspaceConfig) -> frozenset[str]:
    """Check a task's weights file.

    Returns:
        Names of the modules that have coefficients in it.

    Raises:
        BadFileError: truncated or malformed, a wrong dtype, non-finite numbers, no coefficients, missing parts.
        BasisNotFoundError, BasisMismatchError: the basis is nowhere or another one; shapes do not fit it.
    """
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    own: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for key in tensors.keys():  # noqa: SIM118  no iterator of its own
                piece = tensors.get_slice(key)
                found = COEFFICIENT_KEY.match(key)
                if found and piece.get_dtype() not in FLOAT_DTYPES.values():
                    raise BadFileError(
                        f"{file}: {key} has dtype {piece.get_dtype()}; coefficients are floats. Fetch or save the task again."
                    )
                value = tensors.get_tensor(key)
                if value.is_floating_point() and not torch.isfinite(value).all():
                    raise BadFileError(
                        f"{file}: {key} holds NaN or infinite values. The task's training diverged, or the file is "
                        "damaged: fetch or train it again."
                    )
                if found:
                    shapes.setdefault(found["module"], {})[found["name"]] = tuple(value.shape)
                elif carried := BASIS_KEY.match(key):
                    own.setdefault(carried["module"], {})[carried["name"]] = value
    except (SafetensorError, OSError) as error:
        raise BadFileError(
            f"{file}: cannot be read ({error}). It is truncated or no safetensors file: fetch or save the task again."
        ) from error
    if not shapes:
        raise BadFileError(f"{file}: no coefficients inside. It is not a subspace task, or it was saved empty.")
    if config.basis_modules is not None:
        _check_carried(file, config.basis_modules, own)
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
        expected = expected_shapes(config, module, shape)
        if parts != expected:
            raise BasisMismatchError(
                f"{file}: module {module!r} has coefficients {parts}, but {config.coefficients!r} coefficients in this "
                f"basis (k_out={shape['k_out']}, k_in={shape['k_in']}) are {expected}. The config, the weights and the "
                "basis do not belong together: fetch the task again, or pass the basis it was trained on."
            )
    return frozenset(shapes)


def _check_carried(file: Path, wanted: Mapping[str, Any], own: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Hold the basis that a self-contained task carries against the hashes in its config."""
    for module, entry in wanted.items():
        for name, sha256 in entry["sha256"].items():
            value = own.get(module, {}).get(name)
            if value is None:
                raise BadFileError(
                    f"{file}: the task carries its own basis, but subspace_{name} of module {module!r} is missing. The file "
                    "is incomplete: fetch or save the task again."
                )
            # a file saved after model.half() holds other bytes than were hashed: only finiteness can be held there
            if value.dtype == torch.float32 and tensor_sha256(value) != sha256:
                raise BadFileError(
                    f"{file}: subspace_{name} of module {module!r} has sha256 {tensor_sha256(value)}, but the task's config "
                    f"says {sha256}: the basis in this file is not the one the task was trained on. Fetch or save the task "
                    "again."
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
