"""All tasks of a bank's or a bundle's file, as rows for a bank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import BadFileError, BasisMismatchError, SubspaceError
from .bank_file import read_index
from .bank_rows import Pair, RowLayout, filled

Renamed = Callable[[Mapping[str, Any]], dict[str, Any]]


def read_all(
    file: Path, layout: RowLayout, fingerprint: str | None, renamed: Renamed, *, cores_only: bool = False
) -> tuple[list[str], torch.Tensor]:
    """Read all tasks of a bank's or a bundle's file, as rows for a bank.

    Args:
        file: The file.
        layout: Of the bank's rows.
        fingerprint: Of the bank's basis.
        renamed: What puts a mapping by modules of the file under the names that the bank's model has for them.
        cores_only: Leave out of a task what the bank cannot hold.

    Returns:
        The tasks' names, and their rows (tasks, parameters).

    Raises:
        BadFileError: As `read_index`; or a task holds NaN or infinite values.
        BasisMismatchError: The tasks are on another basis, or have other modules, larger sizes, or more own directions
            than the bank has room for, and `cores_only` is off.
        SubspaceError: Some of the tasks have trained modules, and `cores_only` is off.
    """
    index = read_index(file)
    try:
        return _rows(file, index, layout, fingerprint, renamed, cores_only)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        # a bundle's index and header, of which a bank's own reader knows nothing, do not go together
        what = f"{type(error).__name__}: {str(error)[:200]}"
        raise BadFileError(f"{file}: not a readable bank ({what}). Fetch or save it again.") from error


def _rows(
    file: Path,
    index: Mapping[str, Any],
    layout: RowLayout,
    fingerprint: str | None,
    renamed: Renamed,
    cores_only: bool,
) -> tuple[list[str], torch.Tensor]:
    names, modules = list(index["tasks"]), _sizes(index["modules"])
    apart = {name: _sizes(index["entries"][name].get("modules", modules)) for name in index.get("apart", [])}
    if index["basis_fingerprint"] != fingerprint or not (_fit(renamed(modules), layout) or (apart and not names)):
        raise BasisMismatchError(
            f"{file}: its tasks are on the basis {index['basis_fingerprint']} in {len(modules)} modules, this"
            f" bank's on {fingerprint} in {len(layout.cores)}. They belong to another model or basis, or are larger"
            " than this bank's."
        )
    for name, sizes in apart.items():
        if not _fit(renamed(sizes), layout):
            raise BasisMismatchError(
                f"{file}: its task {name!r} has other modules or sizes than this bank. Load it as an adapter, with"
                " `load_task`, or make a bundle without it."
            )
    whole, tensors = _read(file, len(apart))
    if whole and not cores_only:
        raise SubspaceError(
            f"{file}: {len(whole)} of its {len(names) + len(apart)} tasks, such as {list(apart)[whole[0]]!r}, have"
            " trained modules, which a bank does not hold. Load these as adapters, with `load_task`; or take what a"
            " bank can hold of them, with cores_only=True."
        )
    rows = torch.zeros(len(names) + len(apart), layout.width)
    _put_cores(layout, rows[: len(names)], renamed(modules), tensors["cores"])
    own = _own_of_rows(index, tensors)
    for number, (name, sizes) in enumerate(apart.items()):
        core = tensors[f"{number}/core"]
        if core.shape != (RowLayout(sizes).width,):
            raise BadFileError(
                f"{file}: the core of task {name!r} has another size than the index says. Fetch it again."
            )
        _put_cores(layout, rows[len(names) + number], renamed(sizes), core)
        sides = {key.partition("/")[2]: value for key, value in tensors.items() if key.startswith(f"{number}/")}
        own[name] = {
            module: (sides[f"B/{module}"], sides[f"A/{module}"]) for module in sizes if f"B/{module}" in sides
        }
    for row, name in zip(rows, [*names, *apart], strict=True):
        pairs = renamed({module: own.get(name, {}).get(module) for module in apart.get(name, modules)})
        present = {module: pair for module, pair in pairs.items() if pair is not None}
        if cores_only and any(layout.lacking(module, pair) for module, pair in present.items()):
            continue
        for module, pair in present.items():
            layout.put_own(row, f"{file}: its task {name!r}", module, pair)
    if not torch.isfinite(rows).all():
        raise BadFileError(f"{file} holds NaN or infinite values. Fetch or save it again.")
    return [*names, *apart], rows


def _sizes(modules: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    return {module: (k_out, k_in) for module, (k_out, k_in) in modules.items()}


def _fit(sizes: Mapping[str, tuple[int, int]], layout: RowLayout) -> bool:
    """Tell whether cores of these sizes, of the same basis's leading directions, can be filled up to the layout's."""
    return sizes.keys() == layout.cores.keys() and all(
        k_out <= layout.cores[module][0] and k_in <= layout.cores[module][1] for module, (k_out, k_in) in sizes.items()
    )


def _read(file: Path, apart: int) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Read the tensors that a bank may hold; return the numbers of the tasks that have others, too."""
    try:
        with safe_open(file, framework="pt") as tensors:
            held, whole = ["cores"], set()
            for key in tensors.keys():  # noqa: SIM118
                number, _, rest = key.partition("/")
                if number.isdecimal() and int(number) < apart and rest.startswith("extra/"):
                    whole.add(int(number))
                elif key != "cores" and rest != "pad":
                    held.append(key)
            return sorted(whole), {key: tensors.get_tensor(key) for key in held}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise BadFileError(f"{file}: not a readable bank ({error}). Fetch or save it again.") from error


def _put_cores(
    layout: RowLayout, rows: torch.Tensor, sizes: Mapping[str, tuple[int, int]], cores: torch.Tensor
) -> None:
    """Write cores (…, parameters), which have the modules in the order of `sizes`, into rows of the layout."""
    start = 0
    for module, (k_out, k_in) in sizes.items():
        part = cores[..., start : start + k_out * k_in].unflatten(-1, (k_in, k_out))
        layout.core(rows, module)[..., :k_in, :k_out] = part
        start += k_out * k_in


def _own_of_rows(index: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Pair]]:
    """Return task → module → ``(B, A)`` of the tasks in a bank's tensor ``own``."""
    if "own" not in index:
        return {}
    layout = RowLayout({}, {module: tuple(sizes) for module, sizes in index["own"]["modules"].items()})
    return {
        name: {module: filled(part) for module in layout.own if (part := layout.own_part(row, module)) is not None}
        for name, row in zip(index["own"]["tasks"], tensors["own"], strict=True)
    }
