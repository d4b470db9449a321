"""Which batch of several tasks a layer's forward pass belongs to, with any number of them under way in one process.

The batch is a value of the caller's context (`contextvars`): threads, and coroutines that take turns in one thread,
have their own. Code that `torch.compile` traces cannot read a context variable, and reads the thread's list of open
batches in its place; where that does not say which one is meant, the compiler is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..errors import SubspaceError

# held while tasks' parameters are read for a batch, and while they are changed
CHANGES = threading.RLock()


class RowSlot:
    """A layer's own mark, by which batches know it, and the batches that reach it.

    A shallow copy of the layer, such as a replica, shares it; a deep copy or a pickle gets a new one.

    Attributes:
        open: batches that are open, in any thread.
        live: weak references to batches that some context still has, open or not.
        crowded: whether any are open; for compiled code, which is not compiled again for each number of them.
        traced: the names in a forward pass that a compiler is tracing.
        changes: number of steps in which the layer's weights were changed for a merge; odd while one is under way.
        swaps: number of times that one of the layer's tasks was replaced in place.
        disabled_by: the thread that disabled the layer's adapters.
        recomputes: whether a backward pass may compute a batch of several tasks again, without its names.
    """

    def __init__(self) -> None:
        self.open: list[OpenBatch] = []
        self.live: set[Any] = set()
        self.crowded = False
        self.traced: Sequence[str] | None = None
        self.changes = self.swaps = 0
        self.disabled_by: int | None = None
        self.recomputes = False

    def __reduce__(self) -> tuple[Any, ...]:
        return RowSlot, ()


class OpenBatch:
    """A batch of several tasks, from entering it to leaving it.

    Attributes:
        names: id of a layer's slot → a task name per row.
        slots: the slots, kept so that no other object gets their ids.
        call: whether it is that of one call, of which no other thread can be a part.
        number: of batches and plain calls that began earlier the number is smaller.
        closed: whether it was left.
        suspends: whether other coroutines may run in this thread before it is left.
    """

    def __init__(self, names: Mapping[int, Sequence[str]], slots: Sequence[RowSlot], call: bool) -> None:
        self.names, self.slots, self.call = names, slots, call
        self.number = next(_numbers)
        self.closed = False
        self.suspends = _in_coroutine()
        self.home = _thread.open


class _Thread(threading.local):
    """The batches that were entered in this thread and are open, for compiled code."""

    def __init__(self) -> None:
        self.open: list[OpenBatch] = []


_thread = _Thread()
_entered: contextvars.ContextVar[tuple[OpenBatch, ...]] = contextvars.ContextVar("entered", default=())
_plain: contextvars.ContextVar[int | None] = contextvars.ContextVar("plain", default=None)
_numbers = itertools.count()


def enter(batch: OpenBatch) -> None:
    """Let the forward passes of this context be of `batch`."""
    with CHANGES:
        for slot in batch.slots:
            slot.open.append(batch)
            # the set's own method: a collection can come at any moment, and must not wait for a lock
            slot.live.add(weakref.ref(batch, slot.live.discard))
            slot.crowded = True
    batch.home.append(batch)
    _entered.set((*_entered.get(), batch))


def leave(batch: OpenBatch) -> bool:
    """Undo `enter`, in the same context or another.

    Returns:
        Whether it was the one that was entered last of those that are open in this context.
    """
    entered = _entered.get()
    _entered.set(tuple(other for other in entered if other is not batch))
    batch.closed = True
    batch.home.remove(batch)
    with CHANGES:
        for slot in batch.slots:
            slot.open.remove(batch)
            slot.crowded = bool(slot.open)
    return batch not in entered or entered[-1] is batch


@contextlib.contextmanager
def plain_call() -> Iterator[None]:
    """While open, forward passes without names are plain ones, whatever other threads have begun or begin meanwhile.

    But not those of a block of tasks that was open in another thread before, of which they may be meant to be.
    """
    if torch.compiler.is_compiling():
        yield
        return
    before = _plain.get()
    _plain.set(next(_numbers))
    try:
        yield
    finally:
        _plain.set(before)


def names_here(slot: RowSlot, training: bool) -> Sequence[str] | None:
    """Return a task name per row of the batch that a layer computes in this context; None for a plain one.

    Args:
        slot: the layer's.
        training: whether the layer is in training mode.

    Raises:
        SubspaceError: this thread has no batch of its own while others have, or its batch was left already.
    """
    if torch.compiler.is_compiling():
        return _traced_names(slot, training)
    if slot.live or slot.recomputes:
        return _names_in_context(slot, training)
    return None


def _own(slot: RowSlot) -> OpenBatch | None:
    key = id(slot)
    for batch in reversed(_entered.get()):
        if key in batch.names:
            return batch
    return None


def _names_in_context(slot: RowSlot, training: bool) -> Sequence[str] | None:
    batch = _own(slot)
    if batch is not None:
        if batch.closed:
            raise SubspaceError(
                "This task or thread was started inside `with bank.tasks(…)`, which was left before it computed. Wait"
                " for it inside the block, or enter a block of its own in it."
            )
        return batch.names[id(slot)]
    since = _plain.get()
    if any(since is None or not (other.call or other.number > since) for other in list(slot.open)):
        raise SubspaceError(
            "Another thread, or another coroutine, is computing a batch of several tasks on this model, and this"
            " one has no tasks of its own: it is not known whether it belongs to that batch. Enter `with"
            " bank.tasks(…)` in the thread itself or pass it adapter_names=[…] (`__base__` for the base model); a"
            " thread that is to work for the block around it is started with"
            " `target=contextvars.copy_context().run`."
        )
    if slot.recomputes and not training and torch._C._current_graph_task_id() != -1:
        raise SubspaceError(
            "A backward pass computes this layer again, as gradient checkpointing does, and the tasks of the rows are"
            " no longer known. Batches of several tasks have no gradients through checkpoints: enter them under"
            " `torch.no_grad()`, or switch checkpointing off."
        )
    return None


def _traced_names(slot: RowSlot, training: bool) -> Sequence[str] | None:
    if slot.traced is not None:
        return slot.traced
    for batch in reversed(_thread.open):
        if id(slot) in batch.names:
            # coroutines that take turns leave this thread's list in no order
            return _names_in_context(slot, training) if batch.suspends else batch.names[id(slot)]
    return _names_in_context(slot, training) if slot.crowded else None


def note_gradients(slot: RowSlot, result: torch.Tensor, graded: bool) -> None:
    """Note where a backward pass may come through a batch of several tasks, and compute it again.

    Args:
        slot: the layer's.
        result: what it gives.
        graded: whether gradients were enabled when the batch was entered.
    """
    # without gradients inside and with gradients outside is what a reentrant checkpoint does
    if (graded or result.requires_grad) and not slot.recomputes and not torch.compiler.is_compiling():
        slot.recomputes = result.requires_grad or not torch.is_grad_enabled()


def weight_changes(slot: RowSlot) -> int:
    """Return `slot.changes`; 0 for a compiler, which would compile again for each number."""
    return 0 if torch.compiler.is_compiling() else slot.changes


def check_thread(slot: RowSlot) -> None:
    """Check that disabled adapters are so for this batch too.

    Raises:
        SubspaceError: another thread has disabled them, for itself.
    """
    if torch.compiler.is_compiling() or slot.disabled_by in (None, threading.get_ident()):
        return
    raise SubspaceError(
        "Another thread has disabled the model's adapters while this one computes a batch of several tasks."
        " `disable_adapter` is for the whole model: name `__base__` for rows of the base model instead."
    )


def _in_coroutine() -> bool:
    try:
        return asyncio.current_task() is not None
    except RuntimeError:
        return False
