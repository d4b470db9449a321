"""Which cells there are, and in which order: a run that is cut short leaves whole seeds of all families."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..bench import Bench, OutOfTime
from .cells import Cell, K, reached
from .facts import energies, headroom
from .registry import MAKERS, family
from .runs import TUNING_EXAMPLES, TUNING_SEEDS, Runs, most_sources, tuning_cells

COUNTS = (2, 4, 8, 16, 32)  # sources
SIZES = (8, 16, 32)  # k
FEW, MANY = (300, 100), (1000, 50)  # training examples
MIXED = (16, 4)  # sources of other families
# of writers a first try on one source showed nothing to gain: let families-trial tell before its curves are run
FIRST = ("blanks", "kinds", "digits", "groups")


def counts(name: str) -> list[int]:
    """Return the numbers of sources of a family's curve, as far as it has so many."""
    return [count for count in COUNTS if count <= most_sources(name)]


def core(member: str, examples: int, seed: int, k: int, count: int, mixed: bool = False) -> Cell:
    return Cell(member, "core", examples, seed, 0.0, reached(k, count), count, mixed)


def curve_cells(name: str, member: str, seed: int) -> Iterator[Cell]:
    """Yield the core at K in bases of ever more sources, beside LoRA r=8, the head alone and random directions."""
    for examples in FEW:
        yield Cell(member, "head only", examples, seed, 0.0)
        yield Cell(member, "LoRA r=8", examples, seed, 0.0)
        yield Cell(member, "random", examples, seed, 0.0, K)
        for count in reversed(counts(name)):
            yield core(member, examples, seed, K, count)


def mixed_cells(name: str, member: str, seed: int) -> Iterator[Cell]:
    """Yield the core in bases of other families' adapters, and the fleet's mean core alone."""
    for examples in FEW:
        for count in MIXED:
            yield core(member, examples, seed, K, count, mixed=True)
        count = counts(name)[-1]
        yield Cell(member, "mean only", examples, seed, 0.0, reached(K, count), count)


def row_cells(name: str, member: str, seed: int) -> Iterator[Cell]:
    """Yield the other methods."""
    for examples in FEW:
        yield Cell(member, "LoRA r=1", examples, seed, 0.0)
        yield Cell(member, "VeRA", examples, seed, 0.0)
        yield Cell(member, "base weights", examples, seed, 0.0, K)


def example_cells(name: str, member: str, seed: int) -> Iterator[Cell]:
    """Yield the first rows with very few and with many examples, in bases of all sources and of four."""
    for examples in MANY:
        for cell in curve_cells(name, member, seed):
            if cell.examples == FEW[0] and cell.sources in (0, 4, counts(name)[-1]):
                yield replace(cell, examples=examples)


def size_cells(name: str, member: str, seed: int) -> Iterator[Cell]:
    """Yield smaller and larger cores and random bases; sizes that so few sources do not reach are left out."""
    for examples in FEW:
        for k in SIZES:
            if k != K:
                yield Cell(member, "random", examples, seed, 0.0, k)
                for count in counts(name):
                    if reached(k, count) == k:
                        yield core(member, examples, seed, k, count)


def other_example_cells(name: str, member: str, seed: int) -> Iterator[Cell]:
    """Yield what is left with very few and with many examples."""
    for examples in MANY:
        for make in (curve_cells, mixed_cells, row_cells, size_cells):
            for cell in make(name, member, seed):
                if cell.examples == FEW[0]:
                    yield replace(cell, examples=examples)


@dataclass(frozen=True)
class Stage:
    """A part of the benchmark of families: what `run.py` runs as an experiment.

    Attributes:
        name: as on the command line.
        families: in order.
        cells: yields a held-out member's cells for a seed, their rates left open; None where `work` does it all.
        work: what is done once per family, in the place of `cells`.
    """

    name: str
    families: Sequence[str]
    cells: Callable[[str, str, int], Iterator[Cell]] | None = None
    work: Callable[[Runs], None] | None = None

    def perform(self, bench: Bench, results: Path) -> None:
        """Run all cells that are not in `results` yet, seed after seed. Raises `OutOfTime`."""
        every = {name: Runs(name, bench, results / "families") for name in self.families}
        if self.cells is None:
            assert self.work is not None
            for runs in every.values():
                self.work(runs)
            return
        for seed in bench.seeds:
            for name, runs in every.items():
                fill(runs, [cell for member in family(name).held() for cell in self.cells(name, member, seed)])


def fill(runs: Runs, cells: Sequence[Cell]) -> None:
    """Run cells at their rows' rates and say what came of it."""
    for row in dict.fromkeys(cell.row for cell in cells):
        rate = runs.rate(row)
        cells = [replace(cell, rate=rate) if cell.row == row else cell for cell in cells]
    before = len(runs.store.runs)
    for cell in cells:
        runs.run(cell)
    print(f"{runs.name}: {len(runs.store.runs) - before} runs, {len(runs.store.runs)} in all", flush=True)


def try_headroom(runs: Runs) -> None:
    """Say what LoRA r=8 gains over the head alone on the tuning members: whether a family is worth its curves.

    Every run is one of those that choose the rates of both rows, so nothing is done in vain; no held-out member is
    looked at. Raises `OutOfTime`.
    """
    scores: dict[str, dict[str, float]] = {}
    for row in ("LoRA r=8", "head only"):
        rate = runs.rate(row)
        for cell in tuning_cells(runs.name, row):
            test = runs.run(replace(cell, rate=rate))["test"] or 0.0
            scores.setdefault(cell.member, {}).setdefault(row, 0.0)
            scores[cell.member][row] += test / len(TUNING_SEEDS)
    each = ", ".join(
        f"{member} {100 * (both['LoRA r=8'] - both['head only']):+.1f} on {100 * both['head only']:.1f}"
        for member, both in scores.items()
    )
    print(f"{runs.name}: LoRA r=8 − head only, {TUNING_EXAMPLES} examples: {each}", flush=True)


def measure(runs: Runs) -> None:
    """Measure the sources' headroom, and what bases keep of held-out members' adapters; what is there is kept."""
    of = family(runs.name)
    found = runs.store.facts.setdefault("headroom", {})
    rate = runs.rate("head only")
    for member in of.order:
        if member not in found:
            stop_in_time(runs.bench)
            found[member] = headroom(runs, member, rate)
            runs.store.write()
    kept = runs.store.facts.setdefault("energies", [])
    done = {(each["member"], each["seed"], each["sources"], each["mixed"]) for each in kept}
    for seed in runs.bench.seeds:
        for count, mixed in [*((count, False) for count in counts(runs.name)), *((count, True) for count in MIXED)]:
            for member in of.held():
                if (member, seed, count, mixed) not in done:
                    stop_in_time(runs.bench)
                    kept.append(energies(runs, member, seed, count, mixed))
                    runs.store.write()


def stop_in_time(bench: Bench) -> None:
    if time.time() > bench.until:
        raise OutOfTime


def stages() -> dict[str, list[Stage]]:
    """Return group → stages, in the order in which they are run."""
    every = tuple(MAKERS)
    return {
        "families-trial": [Stage("trial", every, work=try_headroom)],
        "families": [Stage("curves", FIRST, curve_cells)],
        "families-more": [Stage("curves-more", [name for name in every if name not in FIRST], curve_cells)],
        "families-weights": [Stage("weights", every, work=measure)],
        "families-mixed": [Stage("mixed", every, mixed_cells)],
        "families-rows": [Stage("rows", every, row_cells)],
        "families-examples": [Stage("examples", every, example_cells)],
        "families-sizes": [Stage("sizes", every, size_cells)],
        "families-rest": [Stage("rest", every, other_example_cells)],
    }
