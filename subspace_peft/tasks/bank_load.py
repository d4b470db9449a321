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
Projected = Callable[[str, Pair], torch.Tensor]

# what else helps a bank that lacks room for a file's tasks
INSTEAD = (
    "take the projection of such tasks on the basis, with cores_only=True, or load them as adapters of the model, with"
    " `load_task`: rows of the same batches name them as they name the bank's tasks."
)


def read_all(
    file: Path,
    layout: RowLayout,
    fingerprint: str | None,
    renamed: Renamed,
    *,
    projected: Projected | None = None,
) -> tuple[list[str], torch.Tensor]:
    """Read all tasks of a bank's or a bundle's file, as rows for a bank.

    Args:
        file: The file.
        layout: Of the bank's rows.
        fingerprint: Of the bank's basis.
        renamed: What puts a mapping by modules of the file under the names that the bank's model has for them.
        projected: What makes a core (k_out, k_in) in a module of the bank from own directions ``(B, A)``. It is used,
            in all modules, for a task with more of these than the bank has room for, whose trained modules are left
            out as well. None refuses such tasks.

    Returns:
        The tasks' names, and their rows (tasks, parameters).

    Raises:
        BadFileError: As `read_index`; or a task holds NaN or infinite values.
        BasisMismatchError: The tasks are on another basis, or have other modules, larger sizes, or more own directions
            than the bank has room for, and `projected` is not given.
        SubspaceError: Some of the tasks have trained modules, and `projected` is not given.
    """
    index = read_index(file)
    try:
        return _rows(file, index, layout, fingerprint, renamed, projected)
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
    projected: Projected | None,
) -> tuple[list[str], torch.Tensor]:
    names, modules = list(index["tasks"]), _Modules(index["modules"], renamed)
    listed: dict[tuple[Any, ...], _Modules] = {}
    apart: dict[str, _Modules] = {}
    for name in index.get("apart", []):
        own_modules = index["entries"][name].get("modules")
        # many tasks have the same modules, whose names are looked for once
        key = tuple((module, *size) for module, size in (own_modules or {}).items())
        if key not in listed:
            listed[key] = modules if own_modules is None else _Modules(own_modules, renamed)
        apart[name] = listed[key]
    _check_fit(file, index, modules, apart, layout, fingerprint)
    tensors, blocks = _read(file, len(apart))
    whole = [name for name, block in zip(apart, blocks, strict=True) if "extra" in block]
    if whole and projected is None:
        raise SubspaceError(
            f"{file}: {len(whole)} of its {len(names) + len(apart)} tasks, such as {whole[0]!r}, have trained modules,"
            " which a bank does not hold. Load these as adapters, with `load_task`; or take what a bank can hold of"
            " them, with cores_only=True."
        )
    rows = torch.zeros(len(names) + len(apart), layout.width)
    if names:
        modules.put_cores(layout, rows[: len(names)], tensors["cores"])
    own = _own_of_rows(index, tensors)
    for row, (name, each), block in zip(rows[len(names) :], apart.items(), blocks, strict=True):
        if block["core"].shape != (each.width,):
            raise BadFileError(
                f"{file}: the core of task {name!r} has another size than the index says. Fetch it again."
            )
        each.put_cores(layout, row, block["core"])
        own[name] = {
            module: (block[f"B/{module}"], block[f"A/{module}"]) for module in each.sizes if f"B/{module}" in block
        }
    places = {name: place for place, name in enumerate([*names, *apart])}
    named = {
        name: {apart.get(name, modules).names[module]: pair for module, pair in pairs.items()}
        for name, pairs in own.items()
    }
    # before any is written: the room that is asked for is enough for all of them
    called = {f"{file}: its task {name!r}": pairs for name, pairs in named.items()}
    layout.check_own(called, None if projected else INSTEAD)
    for name, present in named.items():
        if projected and any(layout.lacking(module, pair) for module, pair in present.items()):
            # core and own directions were trained together: the core alone may be far from the task
            for module, pair in present.items():
                layout.core(rows[places[name]], module).add_(projected(module, pair).T)
            continue
        for module, pair in present.items():
            layout.put_own(rows[places[name]], module, pair)
    if not torch.isfinite(rows).all():
        raise BadFileError(f"{file} holds NaN or infinite values. Fetch or save it again.")
    return list(places), rows


def _check_fit(
    file: Path,
    index: Mapping[str, Any],
    modules: _Modules,
    apart: Mapping[str, _Modules],
    layout: RowLayout,
    fingerprint: str | None,
) -> None:
    """Raise `BasisMismatchError` where tasks of a file are on another basis than a bank, or do not fit its rows."""
    if index["basis_fingerprint"] != fingerprint:
        raise BasisMismatchError(
            f"{file}: its tasks are on the basis {index['basis_fingerprint']}, this bank's on {fingerprint}. They"
            " belong to another model or basis: load them into a bank of an adapter on theirs."
        )
    if (index["tasks"] or not apart) and (clash := modules.clash(layout)):
        raise BasisMismatchError(
            f"{file}: its tasks do not fit this bank: {clash}. Load them into a bank of an adapter with their modules"
            " and sizes, or as adapters, with `load_task`."
        )
    for name, each in apart.items():
        if clash := each.clash(layout):
            raise BasisMismatchError(
                f"{file}: its task {name!r} does not fit this bank: {clash}. Load it as an adapter, with `load_task`,"
                " or make a bundle without it."
            )


class _Modules:
    """The modules that tasks of a file have, in the order in which their cores lie in a row of it.

    Attributes:
        sizes: Module → (k_out, k_in).
        names: Module → its name in the bank.
        width: How many parameters the cores have.
    """

    def __init__(self, sizes: Mapping[str, Any], renamed: Renamed) -> None:
        self.sizes = {module: (k_out, k_in) for module, (k_out, k_in) in sizes.items()}
        self.names = {module: now for now, module in renamed({module: module for module in self.sizes}).items()}
        self.width = sum(k_out * k_in for k_out, k_in in self.sizes.values())

    def clash(self, layout: RowLayout) -> str | None:
        """Return why the cores, of the same basis's leading directions, are larger than a row's, or None."""
        there = set(self.names.values())
        if other := sorted(there ^ layout.cores.keys()):
            return f"module {other[0]!r} is in {'them' if other[0] in there else 'the bank'} alone"
        for module, (k_out, k_in) in self.sizes.items():
            most_out, most_in = layout.cores[self.names[module]]
            if k_out > most_out or k_in > most_in:
                return f"in {module!r} they use {k_out} × {k_in} directions, and the bank has {most_out} × {most_in}"
        return None

    def put_cores(self, layout: RowLayout, rows: torch.Tensor, cores: torch.Tensor) -> None:
        """Write cores (…, parameters) of the file into rows of the layout."""
        start = 0
        for module, (k_out, k_in) in self.sizes.items():
            part = cores[..., start : start + k_out * k_in].unflatten(-1, (k_in, k_out))
            layout.core(rows, self.names[module])[..., :k_in, :k_out] = part
            start += k_out * k_in


def _read(file: Path, apart: int) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Read the tensors that a bank may hold.

    Returns:
        Those of all rows; and of each of the `apart` tasks its own, by what follows its number, with an empty one
        ``extra`` where it has others.
    """
    common: dict[str, torch.Tensor] = {}
    blocks: list[dict[str, torch.Tensor]] = [{} for _ in range(apart)]
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                number, slash, rest = key.partition("/")
                if not slash:
                    common[key] = tensors.get_tensor(key)
                elif not number.isdecimal():
                    raise ValueError(f"a tensor {key[:80]!r}, which belongs to no task")
                elif rest.startswith("extra/"):
                    blocks[int(number)]["extra"] = torch.empty(0)
                elif rest != "pad":
                    blocks[int(number)][rest] = tensors.get_tensor(key)
    except (SafetensorError, OSError, RuntimeError, ValueError, IndexError) as error:
        raise BadFileError(f"{file}: not a readable bank ({error}). Fetch or save it again.") from error
    return common, blocks


def _own_of_rows(index: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Pair]]:
    """Return task → module → ``(B, A)`` of the tasks in a bank's tensor ``own``."""
    if "own" not in index:
        return {}
    layout = RowLayout({}, {module: tuple(sizes) for module, sizes in index["own"]["modules"].items()})
    return {
        name: {module: filled(part) for module in layout.own if (part := layout.own_part(row, module)) is not None}
        for name, row in zip(index["own"]["tasks"], tensors["own"], strict=True)
    }
