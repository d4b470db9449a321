"""The rows of a bank: one tensor, in which each task's name has a slot, and where each module's part of a row lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from ..errors import BasisMismatchError, SubspaceError
from ..tuner.row_context import CHANGES
from ..tuner.row_own import OwnRows

Pair = tuple[torch.Tensor, torch.Tensor]

EMPTY = 0  # the slot of zeros, for rows of the base model


class RowLayout:
    """Where a module's part of a row lies.

    First come all cores, transposed to (k_in, k_out), one after the other; then, of the modules with room for own
    directions, A (φ, in) and Bᵀ (φ, out).

    Attributes:
        cores: Module → its core's (k_out, k_in), in the order in which a row has them.
        own: Module → φ, out and in; only of modules with room for own directions.
        sizes: Module → out and in, of all that these are known of.
        core_width: How many parameters the cores of a row have.
        width: How many parameters a row has.
    """

    def __init__(
        self, cores: Mapping[str, tuple[int, int]], own: Mapping[str, tuple[int, int, int]] | None = None
    ) -> None:
        self.cores = dict(cores)
        self.sizes = {module: (out, size) for module, (_, out, size) in (own or {}).items()}
        self.own = {module: sizes for module, sizes in (own or {}).items() if sizes[0]}
        self._starts: dict[str, int] = {}
        self._own_starts: dict[str, int] = {}
        self.width = 0
        for module, (k_out, k_in) in self.cores.items():
            self._starts[module] = self.width
            self.width += k_out * k_in
        self.core_width = self.width
        for module, (rank, out, size) in self.own.items():
            self._own_starts[module] = self.width
            self.width += rank * (out + size)

    def core(self, rows: torch.Tensor, module: str) -> torch.Tensor:
        """Return a view of the transposed cores of a module (…, k_in, k_out) in `rows` (…, parameters)."""
        (k_out, k_in), start = self.cores[module], self._starts[module]
        return rows[..., start : start + k_out * k_in].unflatten(-1, (k_in, k_out))

    def own_part(self, rows: torch.Tensor, module: str) -> OwnRows | None:
        """Return views of a module's own directions in `rows` (…, parameters).

        None where it has no room for any, or where the rows end with the cores.
        """
        if module not in self.own or rows.shape[-1] == self.core_width:
            return None
        (rank, out, size), start = self.own[module], self._own_starts[module]
        middle, end = start + rank * size, start + rank * (size + out)
        return OwnRows(
            rows[..., start:middle].unflatten(-1, (rank, size)), rows[..., middle:end].unflatten(-1, (rank, out))
        )

    def row(
        self, name: str, cores: Mapping[str, torch.Tensor], own: Mapping[str, Pair | None], instead: str
    ) -> torch.Tensor:
        """Return a task's row (parameters,).

        Args:
            name: The task, for messages.
            cores: Module → (k_out, k_in), in units of ΔW.
            own: Module → ``(B, A)``, (out, φ) and (φ, in), in units of ΔW, or None.
            instead: See `check_own`.

        Raises:
            BasisMismatchError: It has other modules or sizes, or more own directions than there is room for.
        """
        given = {module: tuple(core.shape) for module, core in cores.items()}
        if given != self.cores:
            wrong = sorted(module for module in {*given, *self.cores} if given.get(module) != self.cores.get(module))
            raise BasisMismatchError(
                f"Task {name!r} has {given.get(wrong[0], 'nothing')} in module {wrong[0]!r}, this bank"
                f" {self.cores.get(wrong[0], 'nothing')}. All tasks of a bank have the modules, and at most the sizes,"
                " of the adapter that it was made for."
            )
        row = torch.zeros(self.width, device=next(iter(cores.values())).device)
        for module, core in cores.items():
            self.core(row, module).copy_(core.T)
        pairs = {module: pair for module, pair in own.items() if pair is not None}
        self.check_own({f"Task {name!r}": pairs}, instead)
        for module, pair in pairs.items():
            self.put_own(row, module, pair)
        return row

    def check_own(self, tasks: Mapping[str, Mapping[str, Pair]], instead: str | None) -> None:
        """Check that own directions of tasks have the modules' sizes, and that there is room for them all.

        Args:
            tasks: What messages call a task → module, one of the layout's → ``(B, A)``, (out, φ) and (φ, in).
            instead: What else helps where there is no room, as the end of a sentence; None where none is needed.

        Raises:
            BasisMismatchError: They have other sizes, or there is no room for so many. It names the task and the
                module that need most, so that a bank with room for these has room for all.
        """
        needed: list[tuple[int, str, str]] = []
        for what, pairs in tasks.items():
            for module, (B, A) in pairs.items():
                out, size = self.sizes[module]
                if (*B.shape, *A.shape) != (out, len(A), len(A), size):
                    raise BasisMismatchError(
                        f"{what} has own directions {tuple(B.shape)} and {tuple(A.shape)} in module {module!r}, which"
                        f" is {out} × {size}: give (out, φ) and (φ, in)."
                    )
                if instead is not None and (lacking := self.lacking(module, (B, A))):
                    needed.append((self._room(module) + lacking, what, module))
        if needed:
            most, what, module = max(needed, key=lambda each: each[0])
            raise BasisMismatchError(
                f"{what} has {most} own {'direction' if most == 1 else 'directions'} in module {module!r}, and this"
                f" bank has room for {self._room(module)}. Make the bank with"
                f" `TaskBank(model, extra_rank={most})`, {instead}"
            )

    def put_own(self, row: torch.Tensor, module: str, pair: Pair) -> None:
        """Write own directions of a module, which `check_own` has checked, into a row.

        Where there are more than there is room for, those that change nothing are left out.

        Args:
            row: (parameters,).
            module: The module, one of the layout's.
            pair: ``(B, A)``, (out, φ) and (φ, in).
        """
        place = self.own_part(row, module)
        if place is not None:
            B, A = pair if len(pair[1]) <= len(place.A) else _with_effect(pair)
            place.A[: len(A)] = A
            place.B[: len(A)] = B.T

    def lacking(self, module: str, pair: Pair) -> int:
        """Return how many own directions a module lacks room for; those that change nothing need none."""
        room = self._room(module)
        return 0 if len(pair[1]) <= room else max(0, len(_with_effect(pair)[1]) - room)

    def _room(self, module: str) -> int:
        return self.own[module][0] if module in self.own else 0


def _with_effect(pair: Pair) -> Pair:
    B, A = pair
    used = (B != 0).any(0) & (A != 0).any(1)
    return B[:, used], A[used]


def filled(pair: OwnRows) -> Pair:
    """Return ``(B, A)`` of one task's part of a row, without the zeros that fill it up."""
    places = ((pair.A != 0).any(1) | (pair.B != 0).any(1)).nonzero()
    used = int(places[-1]) + 1 if len(places) else 0
    return pair.B[:used].T.clone(), pair.A[:used].clone()


def padded(cores: Mapping[str, torch.Tensor], layout: RowLayout) -> dict[str, torch.Tensor]:
    """Return cores of a basis's leading directions, filled up with zeros to the layout's sizes.

    Cores of other modules, or with more rows or columns, are returned as they are.
    """
    made = {}
    for module, core in cores.items():
        k_out, k_in = layout.cores.get(module, core.shape)
        missing = (k_in - core.shape[1], k_out - core.shape[0])
        made[module] = core if min(missing) < 0 else F.pad(core, (0, missing[0], 0, missing[1]))
    return made


class TaskRows:
    """Rows of one tensor by the tasks' names, read and changed under `CHANGES`.

    Attributes:
        tensor: (slots, parameters); row `EMPTY` stays zero.
        slots: Name → its row.
        free: Rows that tasks have left.
        wide: Names whose rows have own directions.

    Args:
        layout: Of a row.
        capacity: Number of tasks that there is room for at first; it doubles when it is full.
        device: Where the tensor lies.
    """

    def __init__(self, layout: RowLayout, capacity: int, device: torch.device) -> None:
        self.layout = layout
        self.tensor = torch.zeros(capacity + 1, layout.width, device=device)
        self.slots: dict[str, int] = {}
        self.free: list[int] = []
        self.wide: set[str] = set()

    def copy_of(self, name: str) -> torch.Tensor:
        """Return a copy of a task's row (parameters,).

        Raises:
            SubspaceError: There is no task of that name.
        """
        with CHANGES:
            return self.tensor[self._slot(name)].clone()

    def of(self, names: Sequence[str]) -> torch.Tensor:
        """Return the rows of these names (n, parameters) as they are now; of names that have none, zeros.

        Where none of them has own directions, the rows end with the cores.
        """
        if torch.compiler.is_compiling():
            return self._of(names)
        with CHANGES:
            return self._of(names)

    def _of(self, names: Sequence[str]) -> torch.Tensor:
        rows = torch.tensor([self.slots.get(name, EMPTY) for name in names], device=self.tensor.device)
        held = self.tensor if any(name in self.wide for name in names) else self.tensor[:, : self.layout.core_width]
        return held[rows]

    def all(self) -> tuple[list[str], torch.Tensor, list[str]]:
        """Return all names, a copy of their rows (n, parameters), and those of the names with own directions."""
        with CHANGES:
            names = list(self.slots)
            return names, self.tensor[list(self.slots.values())], [name for name in names if name in self.wide]

    def put(self, names: Sequence[str], rows: torch.Tensor) -> None:
        """Write rows (n, parameters), replacing those of the same names."""
        with CHANGES:
            new = [name for name in names if name not in self.slots]
            added = dict(zip(new, self._vacant(len(new)), strict=True))
            places = [added.get(name, self.slots.get(name, EMPTY)) for name in names]
            # written before they have names: a failure on the way leaves the earlier tasks
            self.tensor[torch.tensor(places, dtype=torch.long)] = rows.to(self.tensor)
            self.wide.difference_update(names)
            has_own = rows[:, self.layout.core_width :].any(1).tolist()
            self.wide.update(name for name, own in zip(names, has_own, strict=True) if own)
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
            self.wide.discard(name)
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
