"""The main tables: one treatment of heads for every row, rates chosen with two seeds, random directions of many draws.

Which treatment that is was decided by a trial of `HEADS`, the group ``head-trial``, on validation splits alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from common import Method

from .bases import hybrid
from .bench import Bench, K
from .experiment import Experiment, usual_rate
from .order import FEW, IMAGE_TASKS, ORDER
from .rows import PerSeed, drawn_vera, head_only, inside, inside_per_seed, lora, mean_only
from .training import BRIEF, HEAD_RATE, Budget

FOLDER = "same-head"  # of the results
WIDE = 28  # 4 · 28² = 3,136 parameters, beside 3,072 of LoRA r=1 and of VeRA r=384
# both are report seeds too: what their runs choose on the validation split says nothing of the test split
SWEEP_SEEDS = (1, 2)
TRIAL_SEEDS = (4, 5)  # no report seeds: the trial looks at no test score, and at no run of the main tables


@dataclass(frozen=True)
class Head:
    """How heads are treated, the same in all rows: their start, as of `Budget`, and their rates beside an adapter.

    Several rates are tried jointly with the adapter's. The row of the head alone sweeps its own rate.
    """

    about: str
    start: str = "drawn"
    rates: tuple[float, ...] = (HEAD_RATE,)

    def budget(self, budget: Budget) -> Budget:
        return replace(budget, head_start=self.start, head_rate=self.rates[0])

    @property
    def joint(self) -> tuple[float, ...]:
        return self.rates if len(self.rates) > 1 else ()


HEADS = {
    "as before": Head("drawn; 5e-3 beside an adapter"),
    "faster": Head("drawn; 1.6e-2 beside an adapter", rates=(1.6e-2,)),
    "swept": Head("drawn; 5e-3 or 1.6e-2, chosen jointly with the adapter's rate", rates=(HEAD_RATE, 1.6e-2)),
    "fitted": Head("a ridge regression's; 5e-3 beside an adapter", "fitted"),
    "trained first": Head("trained alone for as many steps; 5e-3 beside an adapter", "trained"),
}
# by the rule of `same_head_tables.decided` from the committed trial, to which a test holds it
CHOSEN = "faster"


def draw_number(name: str, seed: int) -> int:
    """Return the number by which the random directions of a task's run with `seed` are drawn.

    It is another one for every task and seed, so that no draw is shared: resampling tasks, and seeds within them,
    resamples draws too, and an interval over tasks' means holds what draws add.
    """
    return int(hashlib.sha256(f"draw/{name}/{seed}".encode()).hexdigest()[:7], 16)


def random_row(bench: Bench, name: str, words: str = "random", k: int = K, **config: int) -> PerSeed:
    """Return the row of a random basis of size k, drawn again for every task and seed."""
    return inside_per_seed(
        words, cache(lambda seed: bench.control("random", name, k, draw_number(name, seed))), **config
    )


def first_rows(bench: Bench, name: str) -> list[Method]:
    return [head_only(), lora(8), inside("fleet", bench.basis(name)), random_row(bench, name)]


def more_rows(bench: Bench, name: str) -> list[Method]:
    """Return the next rows, apart so that an interrupted run has the first rows of all tasks."""
    fleet = bench.basis(name)
    return [
        *(inside(f"fleet + {count} own", fleet, extra_rank=count) for count in (2, 1)),
        *(lora(r) for r in (1, 2)),
        drawn_vera(384, lambda seed: draw_number(name, seed)),
        *(random_row(bench, name, f"random + {count} own", extra_rank=count) for count in (1, 2)),
        inside(f"fleet k={WIDE}", bench.basis(name, k=WIDE)),
        random_row(bench, name, f"random k={WIDE}", WIDE),
    ]


def other_rows(bench: Bench, name: str) -> list[Method]:
    """Return the rest, which could be left out."""
    fleet, base = bench.basis(name), bench.control("base-weights", name)
    return [
        inside("LoRA-XS-like", base),
        mean_only(fleet),
        lora(4),
        inside("fleet + 4 own", fleet, extra_rank=4),
        inside("hybrid", hybrid(fleet, base, K)),
        inside("eigenlora", bench.basis(name, builder="eigenlora")),
    ]


def usual(rows: Callable[[Bench, str], list[Method]]) -> Callable[[Bench, str], list[Method]]:
    """Return the same rows without sweeps: each at the rate that was best on the other tasks of its kind."""

    def at_usual_rates(bench: Bench, name: str) -> list[Method]:
        assert bench.results is not None
        folder = bench.results / FOLDER
        return [replace(row, rates=(usual_rate(folder, row.name, name),)) for row in rows(bench, name)]

    return at_usual_rates


def swept(name: str, tasks: list[str], budget: Budget, rows: Callable[[Bench, str], list[Method]]) -> Experiment:
    """Return an experiment under the `CHOSEN` treatment of heads."""
    head = HEADS[CHOSEN]
    return Experiment(
        name, tasks, head.budget(budget), rows, folder=FOLDER, sweep_seeds=SWEEP_SEEDS, head_rates=head.joint
    )


def quick() -> Experiment:
    """Return the first rows of the first three tasks, 40 steps."""
    return swept("main", list(ORDER[:3]), Budget(steps=40, checks=()), first_rows)


def trial(name: str, head: Head) -> Experiment:
    """Return the trial of one treatment: two tasks of either kind, no test split."""
    return Experiment(
        f"head-trial-{name.replace(' ', '-')}",
        FEW,
        head.budget(BRIEF),
        first_rows,
        folder=FOLDER,
        seeds=TRIAL_SEEDS,
        sweep_seeds=TRIAL_SEEDS,
        head_rates=head.joint,
        tested=False,
    )


def groups() -> dict[str, list[Experiment]]:
    """Return group → experiments, in the order in which they are run."""
    texts, images = list(ORDER), list(IMAGE_TASKS)
    return {
        "head-trial": [trial(name, head) for name, head in HEADS.items()],
        "same-head": [swept("main", texts, Budget(), first_rows)],
        "same-head-images": [swept("images", images, Budget(), first_rows)],
        "same-head-more": [swept("main-more", texts, BRIEF, more_rows)],
        "same-head-images-more": [swept("images-more", images, BRIEF, more_rows)],
        "same-head-rest": [swept("main-rest", texts, BRIEF, other_rows)],
        "same-head-images-rest": [swept("images-rest", images, BRIEF, other_rows)],
        "same-head-usual": [
            swept("one-rate", texts, Budget(), usual(first_rows)),
            swept("one-rate-more", texts, BRIEF, usual(more_rows)),
            swept("one-rate-rest", texts, BRIEF, usual(other_rows)),
        ],
    }
