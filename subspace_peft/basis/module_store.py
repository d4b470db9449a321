"""Stores of a basis's modules: mappings from name to `ModuleBasis` that know all shapes before they make a module."""

from __future__ import annotations

import difflib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import UnknownModuleError
from .layout import describe_k as describe_k  # its place in earlier versions
from .module import ModuleBasis, module_shape


class ModuleStore(Mapping[str, ModuleBasis]):
    """A mapping from module name to `ModuleBasis`, each made when it is asked for.

    Attributes:
        entries: what the store has per module, by name.
        precision: what U and V are stored as, where that is not the dtype in which they are given; else None.
        file: the file on this machine that holds the tensors, or None.
    """

    entries: Mapping[str, Any]
    precision: str | None = None
    file: Path | None = None

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def module(self, name: str) -> ModuleBasis:
        """Return a module.

        Raises:
            UnknownModuleError: the store has none of this name; names similar ones.
        """
        self.check_name(name)
        return self[name]

    def check_name(self, name: object) -> None:
        """Raise `UnknownModuleError` where the store has no module of this name, with the names that are near it."""
        if name not in self.entries:
            near = near_names(str(name), self.entries)
            raise UnknownModuleError(
                f"The basis has no module {name!r}."
                + (f" Near it: {', '.join(near)}." if near else f" It has {names_of(self.entries, 3)}.")
            )

    @abstractmethod
    def shapes(self) -> dict[str, dict[str, int]]:
        """Return ``{"out", "in", "k_out", "k_in", "directions"}`` per module, without making one."""

    def held(self, name: str) -> Mapping[str, torch.Tensor]:
        """Return a module's stored tensors as far as they are held in memory: all, or none of a file's."""
        return {}

    def stored(self, name: str) -> Mapping[str, torch.Tensor]:
        """Return a module's tensors as a file holds them, by name; the module's digest is of these."""
        return self[name].tensors()


class MemoryModules(ModuleStore):
    """Modules held in memory as they are."""

    def __init__(self, modules: Mapping[str, ModuleBasis]) -> None:
        self.entries = dict(modules)

    def __getitem__(self, name: str) -> ModuleBasis:
        return self.entries[name]

    def held(self, name: str) -> Mapping[str, torch.Tensor]:
        """Return a module's tensors."""
        return self.entries[name].tensors()

    def shapes(self) -> dict[str, dict[str, int]]:
        """Return the modules' sizes."""
        return {name: module_shape(module) for name, module in self.entries.items()}


def same_module(module_name: str, names: Iterable[str]) -> list[str]:
    """Return those of `names` that mean the module `module_name`: itself alone, else all that differ by leading parts.

    ``encoder.layer.0.query`` and ``bert.encoder.layer.0.query`` mean the same module.
    """
    if module_name in names:
        return [module_name]
    return [name for name in names if name.endswith(f".{module_name}") or module_name.endswith(f".{name}")]


def near_names(name: str, names: Iterable[str], most: int = 3) -> list[str]:
    """Return those of `names` that `name` may have been meant for, the likeliest first."""
    known = list(names)
    # the end of a name is written for the whole of it, as in `target_modules`
    ends = [each for each in known if each.endswith(f".{name}") or name.endswith(f".{each}")]
    return ends[:most] or difflib.get_close_matches(name, known, most)


def names_of(modules: Iterable[str], most: int = 5) -> str:
    """Return a few module names for an error message, with the number of the others."""
    names = sorted(modules)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
