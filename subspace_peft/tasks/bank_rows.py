"""The rows of a bank: one tensor, in which each task's name has a slot, and where each module's part of a row lies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import SubspaceError
from ..tuner.row_context import CHANGES

EMPTY = 0  # the slot of zeros, for rows of the base model


@dataclass(frozen=True, eq=False)
class RowLayout:
    """Where a module's part of a row lies: all cores, transposed to (k_in, k_out), one after the other.

    Attributes:
        cores: Module → its core's (k_out, k_in), in the order in which a row has them.
    """

    cores: Mapping[str, tuple[int, int]]

    @property
    def width(self) -> int:
        """How many parameters a row has."""
        return sum(math.prod(size) for size in self.cores.values())

    def places(self) -> Iterator[tuple[str, tuple[int, int, int]]]:
        """Yield each module with where in a row its core begins, and the core's (k_in, k_out)."""
        start = 0
        for module, (k_out, k_in) in self.cores.items():
            yield module, (start, k_in, k_out)
            start += k_out * k_in


class TaskRows:
    """Rows of one tensor by the tasks' names, read and changed under `CHANGES`.

    Attributes:
        tensor: (slots, parameters); row `EMPTY` stays zero.
        slots: Name → its row.
        free: Rows that tasks have left.

    Args:
        width: Number of parameters of a row.
        capacity: Number of tasks that there is room for at first; it doubles when it is full.
        device: Where the tensor lies.
    """

    def __init__(self, width: int, capacity: int, device: torch.device) -> None:
        self.tensor = torch.zeros(capacity + 1, width, device=device)
        self.slots: dict[str, int] = {}
        self.free: list[int] = []

    def copy_of(self, name: str) -> torch.Tensor:
        """Return a copy of a task's row (parameters,).

        Raises:
            SubspaceError: There is no task of that name.
        """
        with CHANGES:
            return self.tensor[self._slot(name)].clone()

    def of(self, names: Sequence[str]) -> torch.Tensor:
        """Return the rows of these names (n, parameters) as they are now; of names that have none, zeros."""
        if torch.compiler.is_compiling():
            return self._of(names)
        with CHANGES:
            return self._of(names)

    def _of(self, names: Sequence[str]) -> torch.Tensor:
        return self.tensor[torch.tensor([self.slots.get(name, EMPTY) for name in names], device=self.tensor.device)]

    def all(self) -> tuple[list[str], torch.Tensor]:
        """Return all names and a copy of their rows (n, parameters)."""
        with CHANGES:
            return list(self.slots), self.tensor[list(self.slots.values())]

    def put(self, names: Sequence[str], rows: torch.Tensor) -> None:
        """Write rows (n, parameters), replacing those of the same names."""
        with CHANGES:
            new = [name for name in names if name not in self.slots]
            added = dict(zip(new, self._vacant(len(new)), strict=True))
            places = [added.get(name, self.slots.get(name, EMPTY)) for name in names]
            # written before they have names: a failure on the way leaves the earlier tasks
            self.tensor[torch.tensor(places, dtype=torch.long)] = rows.to(self.tensor)
            del self.free[max(0, len(self.free) - len(added)) :]
            self.slots.update(added)

    def remove(self, name: str) -> None:
        """Remove a row.

        Raises:
            SubspaceError: There is no task of that name.
        """
        with CHANGES:
            slot = self._slot(name)
            del self.slots[name]
            self.tensor[slot].zero_()
            self.free.append(slot)

    def _slot(self, name: str) -> int:
        if name not in self.slots:
            raise SubspaceError(f"There is no task {name!r} in the bank, which holds {len(self.slots)}.")
        return self.slots[name]

    def _vacant(self, count: int) -> list[int]:
        """Return rows that no task has, those that tasks have left first; the tensor grows where it has to."""
        first = 1 + len(self.slots) + len(self.free)
        found = [*reversed(self.free), *range(first, first + count)][:count]
        least = 1 + max(found, default=0)
        if least > len(self.tensor):
            grown = self.tensor.new_zeros(max(2 * len(self.tensor), least), self.tensor.shape[1])
            grown[: len(self.tensor)] = self.tensor
            self.tensor = grown
        return found
