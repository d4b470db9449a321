"""Modules by name, each made when it is asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from .module import ModuleBasis


class ByName(Mapping[str, ModuleBasis]):
    """What knows its modules' names before it makes any: `modules` has something about each."""

    modules: Mapping[str, Any]

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def __contains__(self, name: object) -> bool:
        return name in self.modules

    @abstractmethod
    def shapes(self) -> dict[str, dict[str, int]]:
        """As `SubspaceBasis.shapes`, without making a module."""
