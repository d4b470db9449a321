"""Spread a total number of trained parameters over modules and sides, to where the fleet holds most above its null.

The null is strength-matched: for every source, its own singular values in random directions. A direction that holds no
more than the null's holds what any fleet of that strength would, and says nothing of new tasks.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from typing import Any

import torch

from ..basis import ModuleBasis
from ..errors import SubspaceError
from ..sources.factors import Factors
from .distributed import ProcessGroup
from .distributed_modules import divide, work
from .hosvd import Compressed, exact
from .memory import MemoryPlan
from .module_stack import ModuleStack
from .null import generator_for, null_update, strengths_of
from .reader import Reader
from .resume import WorkFolder
from .streaming import compress

MOST_OF_EVEN = 4  # no side of a module gets more directions than so many times what an even spread would give
SPARE = 1e-9  # of the largest energy: gains below this are rounding


def largest(budget: int, modules: int) -> int:
    """Return the most directions that a side of one of so many modules may get."""
    return max(MOST_OF_EVEN, math.ceil(MOST_OF_EVEN * math.sqrt(budget / modules)))


def even(budget: int, modules: int) -> int:
    """Return the directions per side where all modules get the same: k with modules·k² ≤ budget."""
    return max(1, math.isqrt(budget // modules))


def check_budget(budget: int, modules: int) -> None:
    """Raise `SubspaceError` where the budget is less than one parameter per module."""
    if budget < modules:
        raise SubspaceError(
            f"budget={budget}: {modules} modules take at least a parameter each. Give {modules} or more;"
            f" {modules * 256} are k=16 everywhere."
        )


def measure(
    plan: MemoryPlan, reader: Reader, most: int, kept: WorkFolder | None, processes: ProcessGroup, progress: bool
) -> dict[str, torch.Tensor]:
    """Return module → the table of `above_null`, each measured by one process and known to all.

    Args:
        plan: of the fleet's modules.
        reader: of its files.
        most: directions per side at most.
        kept: where tables are kept; those that an interrupted build measured are taken from there.
        processes: that divide the modules.
        progress: show a bar.

    Raises:
        ProcessError: a process has failed.
    """
    names = plan.fleet.modules
    done = {name: found for name in names if kept is not None and (found := kept.get_table(name)) is not None}
    mine, owners = divide(processes, {name: plan.module(name).cost for name in names}, done)

    def one(name: str) -> None:
        done[name] = above_null(plan, reader, name, most)
        if kept is not None:
            kept.put_table(name, done[name])

    work(processes, reader, mine, len(names), "spreading", progress, one)
    own = {name: done[name] for name, owner in owners.items() if owner == processes.index}
    told = [tables for _, tables in processes.share(None, own)]
    return {name: told[owner][name] for name, owner in owners.items()}


def above_null(plan: MemoryPlan, reader: Reader, name: str, most: int) -> torch.Tensor:
    """Measure how much more the leading a × b directions of a module hold than those of its null.

    The null has, for every source, its own singular values in random directions, with its own weight. It goes through
    the same numerics.

    Args:
        plan: of the fleet's modules.
        reader: of its files.
        name: of the module.
        most: a and b at most.

    Returns:
        (A, B) float64, entry [a − 1, b − 1] in units of the weighted energy Σ ‖w ΔW‖²; A and B are at most `most`.
    """
    task = plan.module(name)
    pairs = (reader.pair(i, name) for i in task.members)
    strengths = [strengths_of(B, A, scale) for (B, A), scale in zip(pairs, task.scales, strict=True)]

    def null(place: int) -> Factors:
        return null_update(*task.shape, strengths[place], generator_for("null", name, place))

    if task.exact:
        # the fleet's go before the null's come: one of the two is in memory at a time
        own = _held_at_most(exact(task.updates(reader), task.weights), most)
        other = exact([null(place) for place in range(len(task.members))], task.weights)
        return own - held(other, *own.shape)
    stack = task.stack(reader, keep=plan.keep)
    own = _held_at_most(compress(stack, task.width, leading=task.leading, bound=False), most)
    stack.forget()

    def drawn(place: int) -> tuple[torch.Tensor, torch.Tensor]:
        update = null(place)
        return update.B.float(), update.A.float()

    ones = [1.0] * len(task.ranks)
    stack = ModuleStack(drawn, task.ranks, task.shape, ones, task.weights, task.energy, keep=plan.keep)
    return own - held(compress(stack, task.width, leading=task.leading, bound=False), *own.shape)


def _held_at_most(compressed: Compressed, most: int) -> torch.Tensor:
    return held(compressed, *(min(most, side.Q.shape[1]) for side in (compressed.out, compressed.inner)))


def held(compressed: Compressed, a: int, b: int) -> torch.Tensor:
    """Return the weighted energy in every leading block: (a, b) float64, entry [i − 1, j − 1] of the leading i × j.

    Where there are fewer directions, the energy stays at that of the last.
    """
    sides = compressed.out.Q.shape[1], compressed.inner.Q.shape[1]
    u, v = (torch.eye(width, min(n, width), dtype=torch.float64) for width, n in zip(sides, (a, b), strict=True))
    block = torch.zeros(u.shape[1], v.shape[1], dtype=torch.float64)
    for _, cores in compressed.cores(compressed.weights, u, v):
        block += cores.square().sum(0)
    block = torch.nn.functional.pad(block, (0, b - block.shape[1], 0, a - block.shape[0]))
    return block.cumsum(0).cumsum(1)


def spread(tables: Mapping[str, torch.Tensor], budget: int) -> dict[str, tuple[int, int]]:
    """Return k_out and k_in of every module, with Σ k_out·k_in ≤ `budget`.

    The spread is greedy. Every module begins with 1 × 1. The next parameters go where each of them gains most: of each
    module's larger sizes that can still be paid for, the one to which the gain above the null rises most steeply (so
    that a direction which is worth nothing without the next one is bought with it); of all modules the steepest, the
    first one among equals. Sizes that gain nothing above the null are not bought: then less than the budget is spent.

    Args:
        tables: module → its table of `above_null`.
        budget: entries of the cores in all.

    Raises:
        SubspaceError: fewer than modules.
    """
    check_budget(budget, len(tables))
    sizes = dict.fromkeys(tables, (1, 1))
    left = budget - len(tables)
    least = SPARE * max(float(table.abs().max()) for table in tables.values())
    heap: list[tuple[float, int, str, tuple[int, int]]] = []
    order = {name: number for number, name in enumerate(tables)}

    def offer(name: str) -> None:
        best = _steepest(tables[name], sizes[name], left, least)
        if best is not None:
            heapq.heappush(heap, (-best[0], order[name], name, best[1]))

    for name in tables:
        offer(name)
    while heap:
        _, _, name, size = heapq.heappop(heap)
        cost = size[0] * size[1] - sizes[name][0] * sizes[name][1]
        if cost <= left:
            sizes[name] = size
            left -= cost
        # else it could be paid for when it was offered, and the next best may be still
        offer(name)
    return sizes


def _steepest(
    table: torch.Tensor, size: tuple[int, int], left: int, least: float
) -> tuple[float, tuple[int, int]] | None:
    """Find a module's best larger size.

    Args:
        table: of `above_null` (A, B).
        size: a, b that it has.
        left: parameters that may still be spent.
        least: gains up to this count as none.

    Returns:
        The gain per parameter, and the size; None where nothing is gained.
    """
    a, b = size
    gains = table[a - 1 :, b - 1 :] - table[a - 1, b - 1]
    outs = torch.arange(a, a + gains.shape[0], dtype=torch.float64)
    ins = torch.arange(b, b + gains.shape[1], dtype=torch.float64)
    costs = outs[:, None] * ins - a * b
    slopes = torch.where((costs > 0) & (costs <= left) & (gains > least), gains / costs.clamp_min(1), -1.0)
    best = int(slopes.argmax())
    i, j = divmod(best, slopes.shape[1])
    slope = float(slopes[i, j])
    return (slope, (a + i, b + j)) if slope > 0 else None


def what_was_spent(modules: dict[str, ModuleBasis], tables: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return what a basis records of its budget.

    That is ``spent``, the parameters per task, and per module the energy above the null, in units of Σ ‖w ΔW‖².
    """
    above = {name: float(tables[name][m.k_out - 1, m.k_in - 1]) for name, m in modules.items()}
    return {"spent": sum(m.k_out * m.k_in for m in modules.values()), "energy_above_null_per_module": above}
