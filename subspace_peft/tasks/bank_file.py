"""A bank's file: write it, and read its index, single tasks or all of them, without a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .._io.atomic import write_aside
from .._io.occupied import BANK
from .._io.untrusted import is_name, is_sha256, is_whole, parse_json
from .._version import __version__
from ..basis.module import FLOAT_DTYPES
from ..basis.newer import upgrade_hint
from ..basis.overwriting import Planned, replacing
from ..errors import BadFileError, BasisMismatchError, SubspaceError
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


def write_rows(
    file: str | Path, about: Mapping[str, Any], names: Sequence[str], rows: torch.Tensor, *, overwrite: bool = False
) -> Path:
    """Write a bank's file: ``cores`` (tasks, parameters), and an index in its metadata.

    Args:
        file: The file to write.
        about: What the index says of the tasks besides their names; see `read_index`.
        names: The tasks.
        rows: Their rows (tasks, parameters), on the CPU.
        overwrite: Replace another file, or a bank with tasks that are not among these.

    Raises:
        OccupiedError: `file` is something else, or has further tasks, and `overwrite` is off.
        OSError: The disk refuses; an earlier file stays.
    """
    index = {"format_version": FORMAT_VERSION, "subspace_peft_version": __version__, "tasks": list(names), **about}
    metadata = {"bank": json.dumps(index)}
    planned = Planned(BANK, about["basis_fingerprint"], frozenset(names))
    with replacing(file, planned, overwrite=overwrite):
        write_aside(Path(file), lambda path: save_file({"cores": rows.contiguous()}, path, metadata=metadata))
    return Path(file)


def read_all(
    file: Path,
    cores: Mapping[str, tuple[int, int]],
    fingerprint: str | None,
    renamed: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    *,
    cores_only: bool = False,
) -> tuple[list[str], torch.Tensor]:
    """Read all tasks of a bank's or a bundle's file, as rows for a bank.

    Args:
        file: The file.
        cores: The bank's modules and their cores' (k_out, k_in), in the order in which a row has them.
        fingerprint: Of the bank's basis.
        renamed: What puts a mapping by modules of the file under the names that the bank's model has for them.
        cores_only: Take only the cores of tasks whose trained modules or residuals a bank cannot hold.

    Returns:
        The tasks' names, and their rows (tasks, parameters).

    Raises:
        BadFileError: As `read_index`; or a task holds NaN or infinite values.
        BasisMismatchError: The tasks are on another basis, or have other modules or sizes.
        SubspaceError: Some of the tasks have trained modules or a residual, and `cores_only` is off.
    """
    index = read_index(file)
    names, apart = list(index["tasks"]), list(index.get("apart", []))
    modules = renamed(index["modules"])
    own = {module: list(size) for module, size in cores.items()}
    for name in apart:
        modules_of = renamed(index["entries"][name].get("modules", modules))
        if index["basis_fingerprint"] == fingerprint and modules == own != modules_of:
            raise BasisMismatchError(
                f"{file}: its task {name!r} has other modules or sizes than this bank. Load it as an adapter, with"
                " `load_task`, or make a bundle without it."
            )
    if apart and not cores_only:
        raise SubspaceError(
            f"{file}: {len(apart)} of its {len(names) + len(apart)} tasks, such as {apart[0]!r}, have trained"
            " modules or a residual, which a bank does not hold. Load these as adapters, with `load_task`; or"
            " take their cores alone, with cores_only=True."
        )
    if index["basis_fingerprint"] != fingerprint or modules != own:
        raise BasisMismatchError(
            f"{file}: its tasks are on the basis {index['basis_fingerprint']} in {len(modules)} modules, this"
            f" bank's on {fingerprint} in {len(own)}. They belong to another model or basis."
        )
    try:
        with safe_open(file, framework="pt") as tensors:
            rows = tensors.get_tensor("cores")
            more = [tensors.get_tensor(f"{number}/core") for number in range(len(apart))]
            rows = torch.cat([rows, *(row[None].to(rows) for row in more)])
    except (SafetensorError, OSError, RuntimeError) as error:
        raise BadFileError(f"{file}: not a readable bank ({error}). Fetch or save it again.") from error
    if not torch.isfinite(rows).all():
        raise BadFileError(f"{file} holds NaN or infinite values. Fetch or save it again.")
    if list(modules) != list(own):
        parts = dict(zip(modules, rows.split([a * b for a, b in modules.values()], dim=1), strict=True))
        rows = torch.cat([parts[module] for module in own], dim=1)
    return [*names, *apart], rows


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
