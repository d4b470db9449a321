"""Run cells of a family: bases from its sources, rates from its tuning members, each run kept."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from common import Method

from subspace_peft import SubspaceBasis, build_basis
from subspace_peft.errors import SubspaceError

from .. import same_head, tasks
from ..bench import Bench
from ..encoder import half_is_faster
from ..fleet import SOURCE_BUDGET, SOURCE_RATE, require_left_out
from ..rows import CORE_RATES, HEAD_RATES, LORA_RATES, MEAN_RATES, VERA_RATES, drawn_vera, head_only, inside, lora
from ..rows import mean_only as mean_row
from ..training import Budget
from .cells import RANK, Cell, K, Store, reached
from .registry import MAKERS, family

RATES = {
    "head only": HEAD_RATES,
    "LoRA r=8": LORA_RATES,
    "LoRA r=1": LORA_RATES,
    "VeRA": VERA_RATES,
    "core": CORE_RATES,
    "random": CORE_RATES,
    "base weights": CORE_RATES,
    "mean only": MEAN_RATES,
}
VERA_RANK = 384
TUNING_SEEDS = (11, 12)
TUNING_EXAMPLES = 300
WIDENINGS = 2


def budget_of(examples: int) -> Budget:
    """Return the budget of every row that trains on so many examples, under the benchmark's treatment of heads.

    Raises:
        SubspaceError: that treatment has several rates of the head, which are not swept here.
    """
    head = same_head.HEADS[same_head.CHOSEN]
    if head.joint:
        raise SubspaceError("families: heads of several rates are not swept here: fix one in runs.budget_of.")
    return head.budget(Budget(examples=examples, steps=120 if examples >= 1000 else 60, checks=()))


@dataclass
class Runs:
    """The runs of one family.

    Attributes:
        name: the family.
        bench: keeps hidden states, sources and single runs, and the time.
        out: folder of the results.
    """

    name: str
    bench: Bench
    out: Path

    def __post_init__(self) -> None:
        self._bases: dict[Any, SubspaceBasis] = {}

    @cached_property
    def store(self) -> Store:
        setting = {
            "digest": family(self.name).digest,
            "top": tasks.TOP,
            "tokens": tasks.TOKENS,
            "sources": {**asdict(self.source_budget), "rate": SOURCE_RATE, "r": RANK},
            "budget": asdict(budget_of(TUNING_EXAMPLES)),
            "tuning": [family(self.name).tuned(), list(TUNING_SEEDS), TUNING_EXAMPLES],
        }
        store = Store(self.out / f"{self.name}.json", setting)
        of = family(self.name)
        store.facts |= {
            "about": of.about,
            "kind": of.kind,
            "members": list(of.order),
            "held_out": of.held(),
        }
        return store

    @property
    def source_budget(self) -> Budget:
        return self.bench.source_budget or SOURCE_BUDGET

    def task(self, member: str) -> str:
        return f"{self.name}/{member}"

    def fleet(self, member: str, count: int, seed: int, mixed: bool = False) -> list[str]:
        """Return the tasks whose adapters make the basis for `member`: the first `count` of those that `seed` draws.

        Those of a larger `count` begin with those of a smaller one. `member` is never among them.

        Args:
            member: of this family.
            count: how many.
            seed: of the order.
            mixed: of the other families of the same kind instead.

        Raises:
            SubspaceError: there are fewer.
        """
        if mixed:
            kind = MAKERS[self.name][0]
            others = [name for name in MAKERS if name != self.name and MAKERS[name][0] == kind]
            # one of each family in turn
            drawn = [[f"{name}/{each}" for each in family(name).sources(seed)] for name in others]
            listed = [names[i] for i in range(max(map(len, drawn), default=0)) for names in drawn if i < len(names)]
        else:
            listed = [self.task(each) for each in family(self.name).sources(seed) if each != member]
        if len(listed) < count:
            raise SubspaceError(f"{self.name}: {len(listed)} sources for {member!r}, {count} are wanted.")
        return listed[:count]

    def basis(self, member: str, count: int, k: int, seed: int, mixed: bool = False, **build: Any) -> SubspaceBasis:
        """Return a basis of other members' adapters. Raises `SubspaceError` where the member's own got into it."""
        names = self.fleet(member, count, seed, mixed)
        key = (member, tuple(names), k, tuple(build.items()))
        if key not in self._bases:
            folders = [str(self.bench.source(name)) for name in names]
            built = build_basis(folders, **{"k": k, "leave_one_out": False, "progress": False, **build})
            # few, for a basis takes a megabyte or more
            self._bases = {**dict(list(self._bases.items())[-20:]), key: built}
        return require_left_out(self._bases[key], self.bench.source(self.task(member)))

    def method(self, cell: Cell) -> Method:
        """Return a cell's row, at its rate."""
        task = self.task(cell.member)
        drawn = same_head.draw_number(task, cell.seed)
        if cell.row in ("core", "mean only"):
            basis = self.basis(cell.member, cell.sources, cell.k, cell.seed, cell.mixed)
            row = inside("core", basis) if cell.row == "core" else mean_row(basis)
        elif cell.row == "random":
            row = inside("random", self.bench.control("random", task, cell.k, drawn))
        elif cell.row == "base weights":
            row = inside("base weights", self.bench.control("base-weights", task, cell.k))
        elif cell.row == "VeRA":
            row = drawn_vera(VERA_RANK, lambda seed: drawn)
        else:
            row = head_only() if cell.row == "head only" else lora(int(cell.row.removeprefix("LoRA r=")))
        return replace(row, rates=(cell.rate,))

    def run(self, cell: Cell) -> dict[str, Any]:
        """Return the run of a cell, from the results, the cache, or done now. Raises `OutOfTime`."""
        if (found := self.store.get(cell)) is None:
            task = self.task(cell.member)
            row = self.bench.compare(task, [self.method(cell)], budget_of(cell.examples), seeds=(cell.seed,))[0]
            short = lambda value: None if value is None else round(value, 5)  # noqa: E731
            found = {
                "validation": short(row["validations"][0]),
                "test": short(row["tests"][0]),
                "trained": row["trained_adapter"],
                "seconds": round(row["seconds"], 2),
                "half": half_is_faster(),
            }
            self.store.add(cell, found)
        return found

    def rate(self, row: str) -> float:
        """Return a row's rate: the best on average over the validation splits of the tuning members.

        All rows have the same procedure: three rates a factor of 4 apart, on two members, two seeds each, 300
        examples; a best one at the edge widens the sweep, at most twice; the smaller of equals. Cores
        are tuned at K in a basis of all sources. Raises `OutOfTime`.
        """
        tried: dict[float, float] = {}

        def attempt(rate: float) -> None:
            scores = [self.run(replace(cell, rate=rate))["validation"] or 0.0 for cell in tuning_cells(self.name, row)]
            tried[rate] = sum(scores) / len(scores)

        for rate in RATES[row]:
            attempt(rate)
        for _ in range(WIDENINGS):
            rates = sorted(tried)
            best = max(rates, key=tried.__getitem__)
            if best not in (rates[0], rates[-1]):
                break
            attempt(float(f"{best / 4 if best == rates[0] else best * 4:.6g}"))
        return max(sorted(tried), key=tried.__getitem__)


def tuning_cells(name: str, row: str) -> list[Cell]:
    """Return the runs that choose a row's rate, but for the rate."""
    of = family(name)
    count = most_sources(name) - 1 if row in ("core", "mean only") else 0
    k = reached(K, count or K) if row in ("core", "mean only", "random", "base weights") else 0
    return [Cell(member, row, TUNING_EXAMPLES, seed, 0.0, k, count) for member in of.tuned() for seed in TUNING_SEEDS]


def most_sources(name: str) -> int:
    return len(family(name).order) - family(name).held_out
