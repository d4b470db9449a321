"""A saved task's tensors, held against its config and its basis before any model is touched."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .._io.untrusted import is_name
from ..basis import BasisReference, SubspaceBasis
from ..basis.module import FLOAT_DTYPES, tensor_sha256
from ..errors import BadFileError, BasisMismatchError, HubOfflineError, HubUnavailableError, SubspaceError
from ..hub import fetch
from .task_sizes import TaskSizes

Shapes = dict[str, dict[str, tuple[int, ...]]]
Carried = Mapping[str, Mapping[str, Any]]
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
COEFFICIENT_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.subspace_coef\.(?P<name>\w+)$")
BASIS_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.subspace_(?P<name>[UVMG])$")


def locate_task(path_or_id: str, subfolder: str | None, kwargs: Mapping[str, Any]) -> tuple[Path | None, Path | None]:
    """Find a task's folder and weights file on this machine or in the Hub's cache.

    Args:
        path_or_id: folder or Hub id.
        subfolder: in it.
        kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, as in huggingface_hub; others are ignored.

    Returns:
        Folder and weights file; None for each that is not there.

    Raises:
        HubUnavailableError: the Hub does not answer.
    """
    folder = Path(path_or_id, subfolder or "")
    if folder.is_dir():
        weights = folder / WEIGHTS_FILE
        return folder, weights if weights.is_file() else None
    wanted = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
    try:
        weights = fetch(path_or_id, WEIGHTS_FILE, subfolder=subfolder, **wanted)
    except HubOfflineError:
        return None, None
    except HubUnavailableError:
        raise
    except (OSError, ValueError):
        # PEFT looks for other file names after this, and says so itself where there is none
        return None, None
    return weights.parent, weights


def weights_of(task: Any, folder: Path | None) -> Path:
    """Return the file of a loaded task's tensors.

    Args:
        task: folder or Hub id, as the caller gave it.
        folder: where the task was read from, as `SubspaceConfig.loaded_from` has it; None: from `task` itself.

    Raises:
        SubspaceError: there is no file that can be read without unpickling.
    """
    folder = Path(str(task)) if folder is None else folder
    file = folder / WEIGHTS_FILE
    if file.is_file():
        return file
    pickled = folder / PICKLED_FILE
    if pickled.is_file():
        raise SubspaceError(
            f"{task}: there is only {pickled.name}, which would have to be unpickled. Load it with"
            " `PeftModel.from_pretrained`, if you trust it, and save it again: PEFT writes safetensors."
        )
    raise SubspaceError(f"{task}: there is no {WEIGHTS_FILE}. Pass the folder or Hub id of a saved task.")


def check_task(
    file: Path,
    sizes: TaskSizes,
    reference: BasisReference,
    carried: Carried | None,
    find_basis: Callable[[], SubspaceBasis | None],
) -> dict[str, dict[str, int]]:
    """Check a task's weights file.

    Args:
        file: the file.
        sizes: the sizes of the coefficients, by its config.
        reference: the place and fingerprint of the basis, by its config.
        carried: module → shapes and hashes of the basis in the file, where the config says that it carries one.
        find_basis: finds the basis, once the file's header has been read; None: the file carries it.

    Returns:
        Module → sizes of the basis's module, for the modules that have coefficients in the file.

    Raises:
        BadFileError: truncated or malformed, a wrong dtype, non-finite values, no coefficients, missing parts.
        BasisNotFoundError: the basis is nowhere.
        BasisMismatchError: the basis is another one, or shapes do not fit it.
    """
    if file.exists() and not file.is_file():
        raise BadFileError(f"{file}: it is no regular file. Fetch or save the task again.")
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            shapes, found = _read_header(file, tensors)
            if carried is not None:
                _check_carried(file, carried, found)
            if reference.fingerprint is None and carried is None and not reference.exact:
                raise BadFileError(
                    f"{file}: the task's config does not say which basis it was trained on (basis_fingerprint), so"
                    " none can be held against it. Fetch or save the task again, or pass the basis yourself."
                )
            modules = _check_shapes(file, sizes, reference.fingerprint, carried, find_basis(), shapes)
            # the header fits: only now is anything read
            for key in tensors.keys():  # noqa: SIM118  no iterator of its own
                _check_numbers(file, carried, key, tensors.get_tensor(key))
    except (SafetensorError, OSError, RuntimeError, AttributeError) as error:
        raise BadFileError(
            f"{file}: cannot be read ({error}). It is truncated or no safetensors file: fetch or save the task again."
        ) from error
    return modules


def _read_header(file: Path, tensors: Any) -> tuple[Shapes, Shapes]:
    """Return module → name → shape of the coefficients, and the same of a basis that the file carries."""
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


def _check_carried(file: Path, carried: Carried, found_in_file: Shapes) -> None:
    """Hold the shapes of the basis that a self-contained task carries against its config."""
    wanted = {
        module: {name: _carried_shape(name, entry["shape"]) for name in entry["sha256"]}
        for module, entry in carried.items()
    }
    for module in {**wanted, **found_in_file}:
        expected, found = wanted.get(module, {}), found_in_file.get(module, {})
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


def _check_shapes(
    file: Path,
    sizes: TaskSizes,
    fingerprint: str | None,
    carried: Carried | None,
    basis: SubspaceBasis | None,
    shapes: Shapes,
) -> dict[str, dict[str, int]]:
    """Hold the coefficients' shapes against the basis; return the sizes of the modules' basis modules."""
    known = basis.shapes() if basis is not None else {name: entry["shape"] for name, entry in (carried or {}).items()}
    modules = {}
    for module, parts in shapes.items():
        name = basis.find(module) if basis is not None else module
        if name not in known:
            raise BasisMismatchError(
                f"{file}: it has coefficients for module {module!r}, which the basis {fingerprint or ''} does not"
                " have. Pass the basis that the task was trained on."
            )
        shape = modules[module] = dict(known[name])
        if sizes.coefficients == "directions" and not shape.get("directions"):
            raise BasisMismatchError(
                f"{file}: 'directions' coefficients, but the basis has no directions in module {name!r}. Pass the"
                " basis that the task was trained on."
            )
        expected = sizes.expected(module, shape)
        if parts != expected:
            raise BasisMismatchError(
                f"{file}: module {module!r} has coefficients {parts}, but {sizes.coefficients!r} coefficients"
                f"{_own_in_words(sizes, module, shape)} in this"
                f" basis (k_out={shape['k_out']}, k_in={shape['k_in']}) are {expected}. The config, the weights and"
                " the basis do not belong together: fetch the task again, or pass the basis it was trained on."
            )
    return modules


def _own_in_words(sizes: TaskSizes, module: str, shape: Mapping[str, int]) -> str:
    rank = sizes.extra_of(module, shape)
    return f" with extra_rank={rank}" if rank else ""


def _check_numbers(file: Path, carried: Carried | None, key: str, value: torch.Tensor) -> None:
    """Check that all values are finite and, of a basis that the file carries, that their hashes are the config's.

    Args:
        file: for messages.
        carried: as in `check_task`.
        key: the tensor's, in the file.
        value: the tensor.
    """
    if value.is_floating_point() and value.dtype not in FLOAT_DTYPES:
        raise BadFileError(
            f"{file}: {key} has dtype {value.dtype}, which no task is saved in. Fetch or save the task again."
        )
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise BadFileError(
            f"{file}: {key} holds NaN or infinite values. The task's training diverged, or the file is "
            "damaged: fetch or train it again."
        )
    tensor = BASIS_KEY.match(key)
    # a file saved after model.half() holds other bytes than were hashed: only finiteness can be held there
    if tensor is None or carried is None or value.dtype != torch.float32:
        return
    sha256 = carried[tensor["module"]]["sha256"][tensor["name"]]
    if tensor_sha256(value) != sha256:
        raise BadFileError(
            f"{file}: subspace_{tensor['name']} of module {tensor['module']!r} has sha256 {tensor_sha256(value)},"
            f" but the task's config says {sha256}: the basis in this file is not the one the task was trained on."
            " Fetch or save the task again."
        )
