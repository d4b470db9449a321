"""Read a bank's file without a model: its index, and single tasks out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .._io.untrusted import is_name, is_sha256, is_whole, parse_json
from ..basis.module import FLOAT_DTYPES
from ..basis.newer import upgrade_hint
from ..errors import BadFileError, SubspaceError
from ..tuner.config_check import CHECKS
from ..tuner.row_batch import BASE

FORMAT_VERSION = 1


def read_index(file: Path) -> dict[str, Any]:
    """Read the index of a file that `TaskBank.save` wrote, and check it against the file's header.

    The tensors are not read.

    Returns:
        ``tasks``, names in the order of their rows; ``basis_fingerprint``; ``modules``, module → [k_out, k_in], in the
        order in which a row has them; maybe ``weight_shapes``, ``basis_names`` and ``base_model_name_or_path``, as in
        a task's config.

    Raises:
        BadFileError: The file is damaged, is not a bank's, or has another format version.
    """
    if file.exists() and not file.is_file():
        raise BadFileError(f"{file}: it is not a regular file. Fetch or save the bank again.")
    try:
        with safe_open(file, framework="pt") as tensors:
            index = parse_json((tensors.metadata() or {})["bank"])
            piece = tensors.get_slice("cores")
            shape, dtype = piece.get_shape(), piece.get_dtype()
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise BadFileError(f"{file}: not a readable bank ({error}). Fetch or save it again.") from error
    problem = _problem(index, shape, dtype)
    if problem is not None:
        raise BadFileError(f"{file}: not a readable bank ({problem}). Fetch or save it again.")
    return index


def read_rows(file: Path, name: str) -> dict[str, torch.Tensor]:
    """Read one task's cores out of a bank's file, and no other task.

    Returns:
        Module → (k_out, k_in) float32, in units of ΔW.

    Raises:
        BadFileError: As `read_index`; or the task holds NaN or infinite values.
        SubspaceError: The file has no task of that name.
    """
    index = read_index(file)
    if name not in index["tasks"]:
        raise SubspaceError(f"{file}: there is no task {name!r} among its {len(index['tasks'])}.")
    with safe_open(file, framework="pt") as tensors:
        row = tensors.get_slice("cores")[index["tasks"].index(name)]
    if not torch.isfinite(row).all():
        raise BadFileError(f"{file}: task {name!r} holds NaN or infinite values. Fetch or save it again.")
    cores, start = {}, 0
    for module, (k_out, k_in) in index["modules"].items():
        cores[module] = row[start : start + k_out * k_in].view(k_in, k_out).T.float().contiguous()
        start += k_out * k_in
    return cores


def _problem(index: dict[str, Any], shape: list[int], dtype: str) -> str | None:
    names, modules = index.get("tasks"), index.get("modules")
    if index.get("format_version") != FORMAT_VERSION:
        version = index.get("format_version")
        hint = upgrade_hint(index.get("subspace_peft_version"), isinstance(version, int) and version > FORMAT_VERSION)
        return f"format version {str(version)[:40]}, and this reads {FORMAT_VERSION}.{hint}"
    if not isinstance(names, list) or not all(is_name(name) and name != BASE for name in names):
        return "its index lists no names of tasks"
    if len(set(names)) != len(names):
        return "its index has a name twice"
    if not is_sha256(index.get("basis_fingerprint")):
        return "its index has no basis_fingerprint"
    if not isinstance(modules, dict) or not modules:
        return "its index lists no modules"
    for module, size in modules.items():
        if not (is_name(module) and isinstance(size, list) and len(size) == 2 and all(map(is_whole, size))):
            return f"module {module[:80]!r} has no sizes"
    width = sum(k_out * k_in for k_out, k_in in modules.values())
    for key in ("weight_shapes", "basis_names", "base_model_name_or_path"):
        if wanted := CHECKS[key](index.get(key)):
            return f"its {key}: {wanted}"
    if shape != [len(names), width]:
        return f"its tensor is {shape}, its index says {[len(names), width]}"
    if dtype not in FLOAT_DTYPES.values():
        return f"its parameters are {dtype}, which are not floats"
    return None
