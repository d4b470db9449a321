"""Batches in which every row has its own task: one product with V, one with the rows' cores, one with U."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..errors import SubspaceError

BASE = "__base__"


@dataclass(frozen=True, eq=False)
class Group:
    """The rows of a batch whose tasks share one basis.

    Attributes:
        rows: (n,) their places in the batch; None where the whole batch is one group.
        cores: (n, k_in, k_out) each row's core, transposed, scale folded in; zero for rows without a task.
        U, V: the basis, (out, k_out) and (k_in, in).
    """

    rows: torch.Tensor | None
    cores: torch.Tensor
    U: torch.Tensor
    V: torch.Tensor


class RowBank(Protocol):
    """Tasks beside a layer's adapters, of which rows of a batch may be; `tasks.TaskBank` is one."""

    def __contains__(self, name: object) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

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
    merged: bool

    def _core(self, adapter: str) -> torch.Tensor: ...

    def enter(self, x: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
        """Return ``V x``; see `SubspaceLayer`."""
        ...

    def leave(self, z: torch.Tensor, U: torch.Tensor) -> torch.Tensor:
        """Return ``U z``; see `SubspaceLayer`."""
        ...

    def add_out(self, result: torch.Tensor, z: torch.Tensor, U: torch.Tensor) -> torch.Tensor:
        """Return ``result + U z``; see `SubspaceLayer`."""
        ...


class TaskNames(list[str]):
    """A task name per row, and each layer's preparations for it: one `generate` calls every layer many times.

    Attributes:
        prepared: layer → its groups.
        present: layers that have the same adapters and bank → which of the names are theirs; found once for all of
            them.
        gathered: rows that banks have gathered, for the same layers.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self.prepared: dict[int, list[Group]] = {}
        self.present: dict[tuple[Any, ...], tuple[list[str], bool]] = {}
        self.gathered: dict[tuple[Any, ...], tuple[torch.Tensor | None, torch.Tensor]] = {}


def batch_key(layer: RowLayer) -> tuple[Any, ...]:
    """Return a key that layers share whose rows of a batch are the same: their adapters and their bank."""
    return (id(layer.bank), *layer.subspace_coef)


def prepare(layer: RowLayer, names: TaskNames) -> list[Group]:
    """Return the groups of a batch in one layer.

    A name that this layer does not have leaves its rows as the base has them.
    """
    if id(layer) in names.prepared:
        return names.prepared[id(layer)]
    key = batch_key(layer)
    if key not in names.present:
        distinct = [name for name in dict.fromkeys(names) if name != BASE]
        live = [name for name in distinct if name in layer.subspace_coef]
        banked = layer.bank is not None and any(name in layer.bank for name in set(distinct).difference(live))
        names.present[key] = live, banked
    live, banked = names.present[key]
    by_basis: dict[tuple[int, int], list[str]] = {}
    for name in live:
        by_basis.setdefault((id(layer.subspace_U[name]), id(layer.subspace_V[name])), []).append(name)
    whole = len(by_basis) + banked == 1
    groups = [_group(layer, names, tasks, whole) for tasks in by_basis.values()]
    if banked:
        groups.append(layer.bank.group(layer, names, whole))
    names.prepared[id(layer)] = groups
    return groups


def _group(layer: RowLayer, names: Sequence[str], tasks: list[str], whole: bool) -> Group:
    U, V = layer.subspace_U[tasks[0]], layer.subspace_V[tasks[0]]
    # core 0 is zero, for rows of the base: dropping them from the batch would cost more than multiplying them by it
    stack = [torch.zeros(U.shape[1], V.shape[0], device=U.device)]
    stack += [layer._core(task).float() * layer.scaling[task] for task in tasks]
    place = {task: number for number, task in enumerate(tasks, start=1)}
    rows = None if whole else torch.tensor([i for i, name in enumerate(names) if name in place], device=U.device)
    chosen = [place.get(name, 0) for name in names] if whole else [place[name] for name in names if name in place]
    cores = torch.stack(stack).transpose(1, 2)[torch.tensor(chosen, device=U.device)].contiguous()
    return Group(rows, cores, U, V)


def add_updates(layer: RowLayer, result: torch.Tensor, x: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """Add each row's own update to `result`: ``result + s U C_row V x``.

    Args:
        layer: the adapter layer.
        result: (batch, …, out), of the base layer; it may be changed where no gradient is asked for.
        x: (batch, …, in), the layer's input.
        names: a task name per row.

    Returns:
        (batch, …, out), in result's dtype.
    """
    dtype = result.dtype
    for group in prepare(layer, names if isinstance(names, TaskNames) else TaskNames(names)):
        given = x if group.rows is None else x.index_select(0, group.rows)
        h = layer.enter(given, group.V.to(dtype))
        z = _through(h, group)
        if group.rows is None:
            result = layer.add_out(result, z, group.U.to(z.dtype))
        else:
            result = result.index_add(0, group.rows, layer.leave(z, group.U.to(z.dtype)).to(dtype))
    return result


def _through(h: torch.Tensor, group: Group) -> torch.Tensor:
    """Multiply each row of h (rows, …, k_in) by its own core: (rows, …, k_out)."""
    z = torch.bmm(h.reshape(len(h), -1, h.shape[-1]), group.cores.to(h.dtype))
    return z.reshape(*h.shape[:-1], -1)


def check_rows(layer: RowLayer, x: torch.Tensor, names: Sequence[str]) -> None:
    """Raise `SubspaceError` where the names do not fit the batch, or adapters are merged into the weights."""
    if len(x) != len(names):
        raise SubspaceError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {len(names)} and {len(x)} "
            "respectively."
        )
    if layer.merged:
        raise SubspaceError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )


@contextlib.contextmanager
def task_names_passed(model: nn.Module, layers: type, training: bool, kwargs: dict[str, Any]) -> Iterator[None]:
    """While open, `adapter_names` from `kwargs` reaches every adapter layer of `model` and every `modules_to_save`.

    Args:
        model: the wrapped base model.
        layers: the class of adapter layers.
        training: whether the model is in training mode.
        kwargs: of the model's `forward` or `generate`.

    Raises:
        SubspaceError: in training mode, or for a name that no layer has.
        TypeError: `adapter_names` is no list.
    """
    names = kwargs.get("adapter_names")
    if names is None:
        yield
        return
    if training:
        raise SubspaceError(
            "Cannot pass `adapter_names` when the model is in training mode. Call `model.eval()` first."
        )
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"Got adapter names of type {type(names)}, expected a list of str.")
    adapted = [module for module in model.modules() if isinstance(module, layers)]
    wrapped = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    _check_known(names, adapted)
    # an encoder sees each input once; only the decoder's batch is multiplied
    once = _encoder_modules(model)
    single, repeated = TaskNames(names), TaskNames([name for name in names for _ in range(_copies(kwargs))])
    handles, earlier = [], [(module, module.batch_names) for module in adapted]
    try:
        # a hook on each layer would cost more than the layer's own products at one token per row
        for module in adapted:
            module.batch_names = single if id(module) in once else repeated
        for module in wrapped:
            given = single if id(module) in once else repeated
            handles.append(module.register_forward_pre_hook(_passing(given), with_kwargs=True))
        yield
    finally:
        for module, before in earlier:
            module.batch_names = before
        for handle in handles:
            handle.remove()


def _check_known(names: Sequence[str], layers: Sequence[Any]) -> None:
    """Raise `SubspaceError` where neither the layers nor their banks have one of the names."""
    known = {BASE}.union(*(layer.subspace_coef for layer in layers))
    for bank in {id(layer.bank): layer.bank for layer in layers if layer.bank is not None}.values():
        known |= set(bank)
    if unknown := sorted(set(names) - known):
        raise SubspaceError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. Loaded are"
            f" {', '.join(sorted(known))}."
        )


def _encoder_modules(model: nn.Module) -> set[int]:
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
    return set() if encoder is None or encoder is model else {id(module) for module in encoder.modules()}


def _copies(kwargs: dict[str, Any]) -> int:
    """Return how many rows `generate` makes of each input."""
    config = kwargs.get("generation_config")
    counts = [kwargs.get(name, getattr(config, name, None)) for name in ("num_beams", "num_return_sequences")]
    return max([1, *(count for count in counts if isinstance(count, int))])


def _passing(names: TaskNames) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "adapter_names": names}

    return hook
