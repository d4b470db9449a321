"""Which experiments there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from common import Method

from subspace_peft.report import null_basis

from . import tasks
from .ablations import (
    activation_rows,
    builder_rows,
    fast_rows,
    few_gradient_rows,
    further_builder_rows,
    gradient_rows,
    hybrid_rows,
    kind_rows,
    mean_rows,
    metric_rows,
    mix_rows,
    precondition_rows,
    rate_rows,
    shape_rows,
    side_rows,
    source_rows,
    start_rows,
    started_rows,
)
from .bases import hybrid
from .bench import Bench, K
from .experiment import Experiment, usual_rate
from .fleet import others
from .order import DIGGING, FEW, IMAGE_TASKS, ORDER
from .own_directions import own_rows, own_usual_rows
from .rows import head_only, inside, lora, mean_only, vera
from .same_head import WIDE, groups
from .training import BRIEF, Budget

MAIN = Budget()


def main_rows(bench: Bench, name: str) -> list[Method]:
    return [
        head_only(),
        lora(8),
        inside("fleet", bench.basis(name)),
        inside("random", bench.control("random", name)),
        lora(1),
        vera(384),
    ]


def more_rows(bench: Bench, name: str) -> list[Method]:
    """Return the rest of the main table, apart so that an interrupted run has the first rows of all tasks."""
    fleet, base = bench.basis(name), bench.control("base-weights", name)
    return [
        inside("hybrid", hybrid(fleet, base, K)),
        inside("base weights", base),
        inside("eigenlora", bench.basis(name, builder="eigenlora")),
        mean_only(fleet),
    ]


def one_rate_rows(bench: Bench, name: str) -> list[Method]:
    """Return the rows of the main table without sweeps: each at the rate that was best on the other tasks."""
    return _usual(bench, name, main_rows(bench, name))


def more_one_rate_rows(bench: Bench, name: str) -> list[Method]:
    return _usual(bench, name, [row for row in more_rows(bench, name) if row.name != "mean only"])


def _usual(bench: Bench, name: str, rows: list[Method]) -> list[Method]:
    assert bench.results is not None
    return [replace(row, rates=(usual_rate(bench.results, row.name, name),)) for row in rows]


def as_fleet(rows: Callable[[Bench, str], list[Method]]) -> Callable[[Bench, str], list[Method]]:
    """Return the same rows at the rate that the fleet's row has in ``one-rate``: their steps are of the same size."""

    def at_one_rate(bench: Bench, name: str) -> list[Method]:
        assert bench.results is not None
        rate = usual_rate(bench.results, "fleet", name)
        return [replace(row, rates=(rate,)) for row in rows(bench, name)]

    return at_one_rate


def sized_rows(k: int) -> Callable[[Bench, str], list[Method]]:
    def rows(bench: Bench, name: str) -> list[Method]:
        return [inside("fleet", bench.basis(name, k=k)), inside("random", bench.control("random", name, k))]

    return rows


def short_rows(bench: Bench, name: str) -> list[Method]:
    return [
        head_only(),
        lora(8),
        inside("fleet", bench.basis(name)),
        inside("random", bench.control("random", name)),
    ]


def control_rows(bench: Bench, name: str) -> list[Method]:
    """Return fleets that hold nothing about the task, and fleets of one kind, of five adapters each."""
    members = others(name, tasks.names("text"))
    both = (tasks.SENTIMENT, tasks.TOPIC)
    related, unrelated = both if name in tasks.SENTIMENT else both[::-1]
    noise = null_basis([str(bench.source(other)) for other in members], k=K, progress=False, leave_one_out=False)
    return [
        inside("noise fleet", noise),
        inside("one shared seed", bench.basis(name, start=7)),
        inside("related only", bench.basis(name, fleet=related)),
        inside("unrelated only", bench.basis(name, fleet=unrelated[:5])),
        inside("image fleet", bench.basis(name, fleet=tasks.IMAGES[:7])),
    ]


def experiments() -> dict[str, list[Experiment]]:
    """Return group → experiments, in the order in which they are run."""
    few, digging, every = list(FEW), list(DIGGING), list(ORDER)
    small, large = Budget(examples=100, checks=()), Budget(examples=1000, steps=120, checks=())
    return {
        **groups(),
        # from here on with the head's rate 5e-3 beside adapters, one seed's sweeps and one random basis
        "main": [Experiment("main", every, MAIN, main_rows)],
        "more": [Experiment("main-more", every, BRIEF, more_rows)],
        "one-rate": [
            Experiment("one-rate", every, MAIN, one_rate_rows),
            Experiment("one-rate-more", every, BRIEF, more_one_rate_rows),
        ],
        "examples": [
            Experiment("examples-100", few, small, short_rows),
            Experiment("examples-1000", few, large, short_rows),
        ],
        "own-directions": [
            Experiment("own-directions-one-rate", every, BRIEF, own_usual_rows),
            Experiment("own-directions", every, BRIEF, own_rows),
        ],
        "controls": [Experiment("controls", few, BRIEF, as_fleet(control_rows))],
        "sizes": [
            Experiment(f"size-{WIDE}", every, BRIEF, sized_rows(WIDE)),
            Experiment("size-8", few, BRIEF, sized_rows(8)),
        ],
        "images": [
            Experiment("images", list(IMAGE_TASKS), BRIEF, main_rows),
            Experiment("images-more", list(IMAGE_TASKS), BRIEF, more_rows),
        ],
        "ablations": [
            Experiment("ablation-e-sides", digging, BRIEF, as_fleet(side_rows)),
            Experiment("ablation-a-precondition", digging, BRIEF, precondition_rows),
            Experiment("ablation-b-mean", digging, BRIEF, as_fleet(mean_rows)),
            Experiment("ablation-i-metric", digging, BRIEF, as_fleet(metric_rows)),
            Experiment("ablation-d-hybrid", digging, BRIEF, as_fleet(hybrid_rows)),
            Experiment("ablation-j-sources", digging, BRIEF, as_fleet(source_rows)),
            Experiment("ablation-f-start", digging, BRIEF, as_fleet(start_rows)),
            Experiment("ablation-c-builder", digging, BRIEF, as_fleet(builder_rows)),
            Experiment("ablation-c-builder-more", digging, BRIEF, as_fleet(further_builder_rows)),
            Experiment("ablation-h-kinds", digging, BRIEF, kind_rows),
            Experiment("ablation-d-gradient", digging, BRIEF, as_fleet(gradient_rows)),
            Experiment("ablation-d-few-own", digging, BRIEF, as_fleet(few_gradient_rows)),
            Experiment("ablation-d-activation", digging, BRIEF, as_fleet(activation_rows)),
            Experiment("ablation-f-mix", digging, BRIEF, as_fleet(mix_rows)),
            Experiment("ablation-e-shapes", every, BRIEF, as_fleet(shape_rows)),
            Experiment("ablation-g-rates", every, BRIEF, rate_rows),
            Experiment("ablation-j-started", digging, BRIEF, as_fleet(started_rows)),
        ],
        "stability": [
            Experiment("fast", ["tweets", *digging], BRIEF, fast_rows),
            Experiment("fast-clipped", ["tweets", *digging], replace(BRIEF, clip=1.0), fast_rows),
        ],
        "longer": [Experiment("longer", digging, Budget(steps=180, checks=(60, 120)), short_rows)],
    }
