"""Batches in which every row has its own task: one product with V, one with the rows' cores, one with U.

Where tasks have directions of their own, a batched product with each of their sides comes beside these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from .._moved import moved_name
from .._shown import Shown
from ..base_names import BASE as BASE
from ..errors import SubspaceError
from .row_context import CHANGES, RowSlot, note_gradients, weight_changes
from .row_own import OwnRows, product, stacked

TRAINING = "Cannot pass `adapter_names` when the model is in training mode. Call `model.eval()` first."


@dataclass(frozen=True, eq=False, repr=False)
class Group(Shown):
    """The rows of a batch whose tasks share one basis.

    Attributes:
        rows: (n,) their places in the batch; None where the whole batch is one group.
        cores: (n, k_in, k_out) each row's core, transposed, scale folded in; zero for rows without a task.
        U, V: the basis, (out, k_out) and (k_in, in).
        own: the rows' own directions; None where no row has any.
    """

    rows: torch.Tensor | None
    cores: torch.Tensor
    U: torch.Tensor
    V: torch.Tensor
    own: OwnRows | None = None

    def _shown_facts(self) -> Iterator[tuple[str, Any]]:
        yield "rows", len(self.cores)
        yield "core", " × ".join(map(str, self.cores.shape[1:]))
        yield "own directions", None if self.own is None else self.own.A.shape[1]


class RowBank(Protocol):
    """Tasks beside a layer's adapters, of which rows of a batch may be; `tasks.TaskBank` is one."""

    def __contains__(self, name: object) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def gather(self, names: Sequence[str]) -> torch.Tensor:
        """Return the bank's rows of these names (n, parameters); of names that it does not have, zeros.

        Where none of the tasks has own directions, the rows may end before these.
        """
        ...

    def group(self, layer: RowLayer, names: TaskNames, whole: bool) -> Group:
        """Return the group of those rows whose tasks are the bank's.

        Args:
            layer: the layer that the batch goes through.
            names: a task name per row.
            whole: whether all rows are in this group, those of the base with a zero core.
        """
        ...


class RowLayer(Protocol):
    """The part of an adapter layer that a batch of several tasks needs; `SubspaceLayer` has it."""

    subspace_coef: nn.ModuleDict
    subspace_U: Any
    subspace_V: Any
    scaling: dict[str, float]
    bank: RowBank | None
    row_slot: RowSlot
    merged: bool
    training: bool

    def _core(self, adapter: str) -> torch.Tensor: ...

    def own_part(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the own directions' part of ΔW; see `SubspaceLayer`."""
        ...

    def enter(self, x: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
        """Return ``V x``; see `SubspaceLayer`."""
        ...

    def enter_rows(self, x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """Return ``A_row x`` for each row; see `SubspaceLayer`."""
        ...

    def leave(self, z: torch.Tensor, U: torch.Tensor) -> torch.Tensor:
        """Return ``U z``; see `SubspaceLayer`."""
        ...

    def leave_rows(self, z: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """Return ``B_row z`` for each row; see `SubspaceLayer`."""
        ...

    def add_out(self, result: torch.Tensor, z: torch.Tensor, U: torch.Tensor) -> torch.Tensor:
        """Return ``result + U z``; see `SubspaceLayer`."""
        ...

    def add_rows(self, result: torch.Tensor, z: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """Return ``result + B_row z`` for each row; see `SubspaceLayer`."""
        ...


class TaskNames(list[str]):
    """A task name per row, and each layer's preparations for it: one `generate` calls every layer many times.

    Attributes:
        prepared: layer → its groups.
        present: layers that have the same adapters and bank → which of the names are theirs; found once for all of
            them.
        gathered: their bank and the rows of it, for the same layers; as they were when the batch was entered.
        selected: of those, the rows that are the bank's, and their places in the batch.
        keys: layer → its key in the above, as it was when the batch was entered.
        swappable: the layers and modules that the batch goes through.
        graded: whether gradients were enabled when the batch was entered.
        swaps: of each, how often a task of it had been replaced in place when the first of them was computed.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self.prepared: dict[int, list[Group]] = {}
        self.present: dict[tuple[Any, ...], tuple[list[str], bool]] = {}
        self.gathered: dict[tuple[Any, ...], tuple[RowBank, torch.Tensor]] = {}
        self.selected: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self.swaps: dict[int, int] = {}
        self.keys: dict[int, tuple[Any, ...]] = {}
        self.swappable: list[Any] = []
        self.graded = torch.is_grad_enabled()

    def take(self, layers: Sequence[RowLayer]) -> None:
        """Find the names in `layers`, and take what their banks have of them now, whatever becomes of the banks."""
        self.swappable += layers
        for layer in layers:
            key = self.keys[id(layer)] = _batch_key(layer)
            if key not in self.present:
                distinct = [name for name in dict.fromkeys(self) if name != BASE]
                live = [name for name in distinct if name in layer.subspace_coef]
                bank = layer.bank
                banked = bank is not None and any(name in bank for name in set(distinct).difference(live))
                if banked:
                    self.gathered[key] = bank, bank.gather([BASE if name in live else name for name in self])
                self.present[key] = live, banked
            if not self.present[key][0]:
                # the rows of a bank are views of what was taken; adapters' own parameters may yet be on their way
                prepare(layer, self)

    def check_swaps(self, layer: Any) -> None:
        """Check that all layers and modules take the same version of the model's adapters.

        Raises:
            SubspaceError: `hotswap` has replaced one after the first layer took it.
        """
        if not self.swaps:
            self.swaps = {id(other): other.row_slot.swaps for other in [*self.swappable, layer]}
        if self.swaps.get(id(layer), layer.row_slot.swaps) != layer.row_slot.swaps:
            raise SubspaceError(
                "`hotswap` replaced an adapter while a batch with this model's adapters was computed. Repeat the"
                " batch, or hold such tasks in a `TaskBank`, where they can be replaced at any time."
            )


def _batch_key(layer: RowLayer) -> tuple[Any, ...]:
    """Return a key that layers share whose rows of a batch are the same: their adapters and their bank."""
    return (id(layer.bank), *layer.subspace_coef)


def prepare(layer: RowLayer, names: TaskNames) -> list[Group]:
    """Return the groups of a batch in one layer.

    A name that this layer does not have leaves its rows as the base has them.
    """
    if id(layer) in names.prepared:
        return names.prepared[id(layer)]
    if id(layer) not in names.keys:
        names.take([layer])
        if id(layer) in names.prepared:
            return names.prepared[id(layer)]
    live, banked = names.present[names.keys[id(layer)]]
    if not live:
        groups = [_bank(layer, names).group(layer, names, True)] if banked else []
    elif torch.compiler.is_compiling():
        groups = _live_groups(layer, names, live, banked)
    else:
        with CHANGES:
            names.check_swaps(layer)
            groups = _live_groups(layer, names, live, banked)
    names.prepared[id(layer)] = groups
    return groups


def _live_groups(layer: RowLayer, names: TaskNames, live: list[str], banked: bool) -> list[Group]:
    if gone := [name for name in live if name not in layer.subspace_coef]:
        raise SubspaceError(f"Adapter {gone[0]!r} was deleted while a batch with it was computed. Repeat the batch.")
    by_basis: dict[tuple[int, int], list[str]] = {}
    for name in live:
        by_basis.setdefault((id(layer.subspace_U[name]), id(layer.subspace_V[name])), []).append(name)
    whole = len(by_basis) + banked == 1
    groups = [_group(layer, names, tasks, whole) for tasks in by_basis.values()]
    return [*groups, _bank(layer, names).group(layer, names, whole)] if banked else groups


def _bank(layer: RowLayer, names: TaskNames) -> RowBank:
    """Return the bank that the layer had when the batch was entered."""
    return names.gathered[names.keys[id(layer)]][0]


def _group(layer: RowLayer, names: Sequence[str], tasks: list[str], whole: bool) -> Group:
    U, V = layer.subspace_U[tasks[0]], layer.subspace_V[tasks[0]]
    # core 0 is zero, for rows of the base: dropping them from the batch would cost more than multiplying them by it
    stack = [torch.zeros(U.shape[1], V.shape[0], device=U.device)]
    stack += [layer._core(task).float() * layer.scaling[task] for task in tasks]
    place = {task: number for number, task in enumerate(tasks, start=1)}
    rows = None if whole else torch.tensor([i for i, name in enumerate(names) if name in place], device=U.device)
    chosen = [place.get(name, 0) for name in names] if whole else [place[name] for name in names if name in place]
    each = torch.tensor(chosen, device=U.device)
    cores = torch.stack(stack).transpose(1, 2)[each].contiguous()
    own = stacked([None, *map(layer.own_part, tasks)])
    return Group(rows, cores, U, V, None if own is None else own.of(each))


def add_updates(layer: RowLayer, result: torch.Tensor, x: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """Add each row's own update to `result`: ``result + (s U C_row V + B_row A_row) x``.

    Args:
        layer: the adapter layer.
        result: (batch, …, out), of the base layer; it may be changed where no gradient is asked for.
        x: (batch, …, in), the layer's input.
        names: a task name per row.

    Returns:
        (batch, …, out), in result's dtype.
    """
    dtype = result.dtype
    names = names if isinstance(names, TaskNames) else TaskNames(names)
    for group in prepare(layer, names):
        given = x if group.rows is None else x.index_select(0, group.rows)
        h = layer.enter(given, group.V.to(dtype))
        z = product(h, group.cores.to(h.dtype))
        if group.rows is None:
            result = layer.add_out(result, z, group.U.to(z.dtype))
        else:
            result = result.index_add(0, group.rows, layer.leave(z, group.U.to(z.dtype)).to(dtype))
        if group.own is not None:
            result = _add_own(layer, result, given, group.rows, group.own.to(dtype))
    note_gradients(layer.row_slot, result, names.graded)
    return result


def _add_own(
    layer: RowLayer, result: torch.Tensor, x: torch.Tensor, rows: torch.Tensor | None, own: OwnRows
) -> torch.Tensor:
    z = layer.enter_rows(x, own.A)
    if rows is None:
        return layer.add_rows(result, z, own.B)
    return result.index_add(0, rows, layer.leave_rows(z, own.B).to(result.dtype))


def check_rows(layer: RowLayer, x: torch.Tensor, names: Sequence[str]) -> None:
    """Raise `SubspaceError` where the names do not fit the batch or the layer's state."""
    if len(x) != len(names):
        raise SubspaceError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {len(names)} and {len(x)} "
            "respectively."
        )
    if layer.merged or weight_changes(layer.row_slot) % 2:
        raise SubspaceError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    if layer.training:
        raise SubspaceError(TRAINING)


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
