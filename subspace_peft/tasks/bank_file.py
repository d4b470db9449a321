"""A bank's file: write it, and read its index or single tasks, without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
from ..errors import BadFileError, SubspaceError
from ..tuner.config_check import CHECKS
from ..tuner.row_batch import BASE
from .bank_rows import Pair, RowLayout, filled

FORMAT_VERSION = 2  # of files with own directions, which earlier readers do not know; without any it is 1


def read_index(file: Path) -> dict[str, Any]:
    """Read the index of a file that `TaskBank.save` wrote, and check it against the file's header.

    The tensors are not read.

    Returns:
        ``tasks``, names in the order of their rows; ``basis_fingerprint``; ``modules``, module → [k_out, k_in], in the
        order in which a row has them; maybe ``weight_shapes``, ``basis_names`` and ``base_model_name_or_path``, as in
        a task's config; maybe ``own``, of own directions, with the names of the ``tasks`` that have any and
        ``modules``, module → [φ, out, in], in the order in which a row has them.

    Raises:
        BadFileError: The file is damaged, is not a bank's, or has another format version.
    """
    if file.exists() and not file.is_file():
        raise BadFileError(f"{file}: it is not a regular file. Fetch or save the bank again.")
    try:
        with safe_open(file, framework="pt") as tensors:
            index = parse_json((tensors.metadata() or {})["bank"])
            found = {key: tensors.get_slice(key) for key in ("cores", "own") if key in tensors.keys()}  # noqa: SIM118
            shapes = {key: (piece.get_shape(), piece.get_dtype()) for key, piece in found.items()}
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise BadFileError(f"{file}: not a readable bank ({error}). Fetch or save it again.") from error
    problem = _problem(index, shapes)
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
    row = _row(file, name, "cores")
    cores, start = {}, 0
    for module, (k_out, k_in) in read_index(file)["modules"].items():
        cores[module] = row[start : start + k_out * k_in].view(k_in, k_out).T.float().contiguous()
        start += k_out * k_in
    return cores


def read_own(file: Path, name: str) -> dict[str, Pair]:
    """Read one task's own directions out of a bank's file, and no other task.

    Returns:
        Module → ``(B, A)``, (out, φ) and (φ, in) float32, in units of ΔW; only of modules where the task has any.

    Raises:
        BadFileError: As `read_rows`.
        SubspaceError: The file has no task of that name.
    """
    index = read_index(file)
    if name in index["tasks"] and name not in index.get("own", {}).get("tasks", ()):
        return {}
    layout = RowLayout({}, {module: tuple(sizes) for module, sizes in index["own"]["modules"].items()})
    row = _row(file, name, "own").float()
    parts = {module: layout.own_part(row, module) for module in layout.own}
    found = {module: filled(part) for module, part in parts.items() if part is not None}
    return {module: pair for module, pair in found.items() if len(pair[1])}


def _row(file: Path, name: str, kind: str) -> torch.Tensor:
    """Read one task's row of the tensor `kind`, ``cores`` or ``own``."""
    index = read_index(file)
    if name not in index["tasks"]:
        raise SubspaceError(f"{file}: there is no task {name!r} among its {len(index['tasks'])}.")
    names = index["tasks"] if kind == "cores" else index["own"]["tasks"]
    with safe_open(file, framework="pt") as tensors:
        row = tensors.get_slice(kind)[names.index(name)]
    if not torch.isfinite(row).all():
        raise BadFileError(f"{file}: task {name!r} holds NaN or infinite values. Fetch or save it again.")
    return row


def write_rows(
    file: str | Path,
    about: Mapping[str, Any],
    layout: RowLayout,
    names: Sequence[str],
    rows: torch.Tensor,
    wide: Sequence[str],
    *,
    overwrite: bool = False,
) -> Path:
    """Write a bank's file: ``cores`` (tasks, parameters), ``own`` of the tasks that have own directions, and an index.

    Args:
        file: The file to write.
        about: What the index says of the tasks besides their names; see `read_index`.
        layout: Of the rows.
        names: The tasks.
        rows: Their rows (tasks, parameters), on the CPU.
        wide: Those of the tasks that have own directions.
        overwrite: Replace another file, or a bank with tasks that are not among these.

    Raises:
        OccupiedError: `file` is something else, or has further tasks, and `overwrite` is off.
        OSError: The disk refuses; an earlier file stays.
    """
    index = {
        "format_version": FORMAT_VERSION if wide else 1,
        "subspace_peft_version": __version__,
        "tasks": list(names),
        **about,
    }
    tensors = {"cores": rows[:, : layout.core_width].contiguous()}
    if wide:
        index["own"] = {"tasks": list(wide), "modules": {module: list(sizes) for module, sizes in layout.own.items()}}
        places = {name: place for place, name in enumerate(names)}
        tensors["own"] = rows[[places[name] for name in wide], layout.core_width :].contiguous()
    metadata = {"bank": json.dumps(index)}
    planned = Planned(BANK, about["basis_fingerprint"], frozenset(names))
    with replacing(file, planned, overwrite=overwrite):
        write_aside(Path(file), lambda path: save_file(tensors, path, metadata=metadata))
    return Path(file)


def _problem(index: dict[str, Any], shapes: Mapping[str, tuple[list[int], str]]) -> str | None:
    names, modules = index.get("tasks"), index.get("modules")
    version = index.get("format_version")
    if isinstance(version, bool) or version not in (1, FORMAT_VERSION):
        hint = upgrade_hint(index.get("subspace_peft_version"), isinstance(version, int) and version > FORMAT_VERSION)
        return f"format version {str(version)[:40]}, and this reads 1 and {FORMAT_VERSION}.{hint}"
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
    if problem := _tensor_problem("cores", shapes, [len(names), width]):
        return problem
    if (version == FORMAT_VERSION) != ("own" in index):
        return f"format version {version}, which does not go with the own directions in its index"
    return _own_problem(index, shapes) if "own" in index else None


def _own_problem(index: dict[str, Any], shapes: Mapping[str, tuple[list[int], str]]) -> str | None:
    """Return what is wrong with what the index says of own directions, and with their tensor."""
    own = index["own"]
    names, modules = (own.get("tasks"), own.get("modules")) if isinstance(own, dict) else (None, None)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return "its index lists no tasks with own directions"
    if len(set(names)) != len(names) or not set(names) <= set(index["tasks"]):
        return "its index lists own directions of other tasks than it has"
    if not isinstance(modules, dict) or not set(modules) <= set(index["modules"]):
        return "its index lists own directions in other modules than it has"
    width = 0
    for module, sizes in modules.items():
        if not (isinstance(sizes, list) and len(sizes) == 3 and all(map(_is_size, sizes))):
            return f"module {module[:80]!r} has no sizes of own directions"
        rank, out, size = sizes
        width += rank * (out + size)
    return _tensor_problem("own", shapes, [len(names), width])


def _is_size(value: Any) -> bool:
    # a layer's own sizes are not bounded as a number of directions is: an embedding has a row per token
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _tensor_problem(key: str, shapes: Mapping[str, tuple[list[int], str]], wanted: list[int]) -> str | None:
    shape, dtype = shapes.get(key, (None, ""))
    if shape != wanted:
        return f"its tensor {key!r} is {shape}, its index says {wanted}"
    if dtype not in FLOAT_DTYPES.values():
        return f"its parameters are {dtype}, which are not floats"
    return None
