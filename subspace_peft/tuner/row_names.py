"""How the tasks' names of a batch reach the layers and whole-trained modules of a model, by `adapter_names`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..errors import SubspaceError
from .row_batch import BASE, TRAINING, TaskNames
from .row_context import CHANGES, OpenBatch, RowSlot, enter, leave, names_here, plain_call


@contextlib.contextmanager
def task_names_passed(model: nn.Module, layers: type, training: bool, kwargs: dict[str, Any]) -> Iterator[None]:
    """While open, `adapter_names` from `kwargs` reaches every adapter layer of `model` and every `modules_to_save`.

    That goes for this context only (see `row_context`). What a bank has of the tasks is taken now.

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
        with plain_call():
            yield
        return
    if training:
        raise SubspaceError(TRAINING)
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"Got adapter names of type {type(names)}, expected a list of str.")
    if torch.compiler.is_compiling():
        with _traced(*_reached(model, layers, names, kwargs)):
            yield
        return
    with CHANGES:
        # no task may go between its name's check and its parameters' copy
        batch = OpenBatch(*_reached(model, layers, names, kwargs), call=not kwargs.get("block", False))
    enter(batch)
    try:
        yield
    except BaseException:
        leave(batch)
        raise
    if not leave(batch):
        raise SubspaceError(
            "Blocks of tasks in this thread were left in another order than they were entered in, as by generators"
            " that take turns: these share one context, and what was computed meanwhile may have had the other's"
            " tasks. Enter `with bank.tasks(…)` around each step of a generator, and not around a `yield`."
        )


def _reached(
    model: nn.Module, layers: type, names: Sequence[str], kwargs: dict[str, Any]
) -> tuple[dict[int, TaskNames], list[RowSlot]]:
    """Return the names for each layer, by the id of its slot, and the slots."""
    adapted, wrapped = _find(model, layers)
    _check_known(names, adapted)
    # an encoder sees each input once; only the decoder's batch is multiplied
    once, copies = _encoder_modules(model), _copies(kwargs)
    single = TaskNames(names)
    repeated = TaskNames([name for name in names for _ in range(copies)]) if copies > 1 else single
    reached = {id(module.row_slot): single if id(module) in once else repeated for module in adapted + wrapped}
    for given in (single, repeated) if copies > 1 else (single,):
        given.take([layer for layer in adapted if reached[id(layer.row_slot)] is given])
        given.swappable += [module for module in wrapped if reached[id(module.row_slot)] is given]
    return reached, [module.row_slot for module in adapted + wrapped]


@contextlib.contextmanager
def _traced(names: dict[int, TaskNames], slots: list[RowSlot]) -> Iterator[None]:
    """Let the layers find their names while a compiler traces the call."""
    try:
        for slot in slots:
            slot.traced = names[id(slot)]
        yield
    finally:
        for slot in slots:
            slot.traced = None


def _find(model: nn.Module, layers: type) -> tuple[list[Any], list[Any]]:
    """Return the adapter layers in `model`, and the modules that adapters train whole.

    Other threads may load adapters meanwhile, which iterators over a model's modules do not survive.
    """
    adapted, wrapped, waiting, seen = [], [], [model], set()
    while waiting:
        module = waiting.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, layers):
            adapted.append(module)
            waiting.append(module.base_layer)
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            wrapped.append(_hooked(module))
        waiting += list(module._modules.values())
    return adapted, wrapped


def _hooked(module: Any) -> Any:
    """Let a module of PEFT's, which asks its caller for the names, take those of the context."""
    if "row_slot" not in module.__dict__:
        with CHANGES:
            if "row_slot" not in module.__dict__:
                module.register_forward_pre_hook(_pass_names, with_kwargs=True)
                module.row_slot = RowSlot()
    return module


def _pass_names(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    names = names_here(module.row_slot, module.training)
    if names is None:
        return None
    # tasks that did not train this module have the base model's
    own = [name if name in module._adapters else BASE for name in names]
    if isinstance(names, TaskNames) and own.count(BASE) < len(own) and not torch.compiler.is_compiling():
        names.check_swaps(module)
    return args, {**kwargs, "adapter_names": own}


def _check_known(names: Sequence[str], layers: Sequence[Any]) -> None:
    """Raise `SubspaceError` where neither the layers nor their banks have one of the names."""
    known = {BASE}.union(*(list(layer.subspace_coef) for layer in layers))
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
