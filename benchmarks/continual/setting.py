"""The setting of the comparison: which tasks are given, which arrive in what order, what every method may spend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from benchmarks.quality import tasks
from benchmarks.quality.bench import Bench
from benchmarks.quality.order import ORDER
from benchmarks.quality.training import BRIEF, Budget, make_model, pooled
from subspace_peft import SubspaceBasis, build_basis

FIRST = 4  # tasks whose adapters are given: the first basis is theirs
K = 16
RANK = 8  # of every LoRA
SEEDS = (1, 2, 3)
SWEEP_SEED = 0
SWEEP_TASKS = 4  # the first that arrive
# each begins with another four tasks, so that every task arrives in two, at other places and behind other tasks
ORDERS = {name: (*ORDER[at:], *ORDER[:at]) for name, at in (("A", 0), ("B", FIRST), ("C", 2 * FIRST))}
SWEEP_ORDER = "A"


@dataclass(frozen=True)
class Stream:
    """Tasks that arrive one after another.

    Attributes:
        given: the tasks whose LoRAs are there from the start, from which the first basis is built.
        arriving: the tasks to learn, in order.
        seed: draws each task's training examples, their order and its head's start, the same for every method.
    """

    given: tuple[str, ...]
    arriving: tuple[str, ...]
    seed: int

    @classmethod
    def of_order(cls, name: str, seed: int) -> Stream:
        """Return the stream of one of `ORDERS`."""
        return cls(ORDERS[name][:FIRST], ORDERS[name][FIRST:], seed)

    def before(self, name: str) -> tuple[str, ...]:
        """Return the arriving tasks that come before one."""
        return self.arriving[: self.arriving.index(name)]


def in_full(stream: Stream) -> bool:
    """Tell whether all earlier tasks are tested after every task; in other streams they are after the last."""
    return stream == Stream.of_order(SWEEP_ORDER, SEEDS[0])


class Data:
    """The tasks, the top layers and the given adapters, each read once.

    Args:
        bench: the quality benchmark's cache of hidden states and adapters.
        budget: of every task that arrives.
        k: directions of the first basis, and of Share's.
    """

    def __init__(self, bench: Bench, budget: Budget = BRIEF, k: int = K) -> None:
        self.bench, self.budget, self.k = bench, budget, k
        self._tasks: dict[str, tasks.EncodedTask] = {}
        self._pooled: dict[str, tasks.EncodedTask] = {}
        self._bases: dict[tuple[str, ...], SubspaceBasis] = {}

    def task(self, name: str) -> tasks.EncodedTask:
        """Return a task; all stay in memory, as every one is tested again after each that follows."""
        if name not in self._tasks:
            self._tasks[name] = tasks.load(name, self.bench.folder)
        return self._tasks[name]

    def pooled(self, name: str) -> tasks.EncodedTask:
        """Return a task as a head on untouched layers sees it."""
        if name not in self._pooled:
            self._pooled[name] = pooled(self.bench.top(name), self.task(name))
        return self._pooled[name]

    def model(self, name: str, seed: int) -> nn.Module:
        """Return the untouched top layers with a head for the task, drawn by `seed`."""
        return make_model(self.bench.top(name), self.task(name).outputs, seed)

    def first_basis(self, given: Sequence[str]) -> SubspaceBasis:
        """Return the basis of the given tasks' LoRAs, with their cores: a later refit needs them."""
        key = tuple(given)
        if key not in self._bases:
            folders = [str(self.bench.source(name)) for name in key]
            self._bases[key] = build_basis(folders, k=self.k, leave_one_out=False, progress=False)
        return self._bases[key]

    def facts(self, stream: Stream) -> dict[str, Any]:
        """Return what decides the data of a stream, for the key under which its results are kept."""
        return {
            "given": stream.given,
            # pairs: in a dict their order would not be part of the key
            "arriving": [(name, self.task(name).digest) for name in stream.arriving],
            "budget": self.budget.settings(),
            "k": self.k,
        }
