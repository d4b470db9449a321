"""Which experiments there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file

from subspace_peft import SubspaceBasis, build_basis
from subspace_peft.basis import ModuleBasis
from subspace_peft.build import open_source
from subspace_peft.compare.methods import Method
from subspace_peft.report import null_basis

from . import tasks
from .bases import (
    centred,
    each_module,
    from_activation_metric,
    hybrid,
    input_roots,
    one_sided,
    preconditioned,
    scaled_inputs,
    shared_inputs,
)
from .bench import Bench, Experiment, K, usual_rate
from .fleet import others, some_inputs
from .gradients import first_gradients, gradient_basis
from .rows import CORE_RATES, head_only, inside, inside_per_seed, lora, mean_only, vera
from .starts import convex_mix, nearest_source, starting_at_mix
from .training import Budget, draw_examples, make_model

WIDE = 28  # 4 · 28² = 3,136 numbers, beside 3,072 of LoRA r=1 and of VeRA r=384
FEW = ("movies", "reviews", "newsgroups", "noun-kinds")  # for all but the main table; two of each kind
# the task that the main table showed to be hardest for the fleet's basis: to find out what closes that
DIGGING = (*FEW, "speech-parts")
IMAGE_TASKS = ("tops", "footwear", "garments", "digits-low", "digits-high")
MAIN = Budget()
BRIEF = Budget(checks=())  # the same, validated at its end only
ORDER = (
    "movies", "noun-kinds", "reviews", "newsgroups", "tweets", "reuters", "products", "speech-parts", "editorials",
    "election", "moods", "mail",
)  # fmt: skip


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
    """The rest of the main table, apart so that an interrupted run has the first rows of all tasks."""
    fleet, base = bench.basis(name), bench.control("base-weights", name)
    return [
        inside("hybrid", hybrid(fleet, base, K)),
        inside("base weights", base),
        inside("eigenlora", bench.basis(name, builder="eigenlora")),
        mean_only(fleet),
    ]


def one_rate_rows(bench: Bench, name: str) -> list[Method]:
    """The rows of the main table without a sweep of their own: each at the rate that was best on the other tasks."""
    return _usual(bench, name, main_rows(bench, name))


def more_one_rate_rows(bench: Bench, name: str) -> list[Method]:
    return _usual(bench, name, [row for row in more_rows(bench, name) if row.name != "mean only"])


def _usual(bench: Bench, name: str, rows: list[Method]) -> list[Method]:
    assert bench.results is not None
    return [replace(row, rates=(usual_rate(bench.results, row.name, name),)) for row in rows]


def as_fleet(rows: Callable[[Bench, str], list[Method]]) -> Callable[[Bench, str], list[Method]]:
    """The same rows at one rate, the one that the fleet's row has in ``one-rate``: their steps are of the same size."""

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
    """Fleets that hold nothing about the task, and fleets of one kind, of five adapters each."""
    members = others(name, tasks.names("text"))
    kin, strangers = (tasks.SENTIMENT, tasks.TOPIC) if name in tasks.SENTIMENT else (tasks.TOPIC, tasks.SENTIMENT)
    noise = null_basis([str(bench.source(other)) for other in members], k=K, progress=False, leave_one_out=False)
    return [
        inside("noise fleet", noise),
        inside("one shared seed", bench.basis(name, start=7)),
        inside("kin only", bench.basis(name, fleet=kin)),
        inside("strangers only", bench.basis(name, fleet=strangers[:5])),
        inside("image fleet", bench.basis(name, fleet=tasks.IMAGES[:7])),
    ]


def more_image_rows(bench: Bench, name: str) -> list[Method]:
    fleet, base = bench.basis(name), bench.control("base-weights", name)
    return [vera(384), inside("base weights", base), inside("hybrid", hybrid(fleet, base, K)), mean_only(fleet)]


def precondition_rows(bench: Bench, name: str) -> list[Method]:
    fleet = bench.basis(name)
    return [
        inside("entries", preconditioned(fleet, "rms"), coefficients="directions"),
        inside("entries, ridge 0.5", preconditioned(fleet, "rms", 0.5), coefficients="directions"),
        inside("sides", preconditioned(fleet, "sides")),
    ]


def mean_rows(bench: Bench, name: str) -> list[Method]:
    fleet = bench.basis(name)
    return [
        inside("mean fixed", fleet, mean_gain="fixed"),
        inside("mean gain trained", fleet, mean_gain="trainable"),
        inside("start at mean", fleet, start="mean"),
    ]


def builder_rows(bench: Bench, name: str) -> list[Method]:
    return [
        inside("plain HOSVD", bench.basis(name, alternations=0)),
        inside("weights by norm", bench.basis(name, weights="norm")),
    ]


def further_builder_rows(bench: Bench, name: str) -> list[Method]:
    fleet = bench.basis(name)
    sources = [open_source(str(bench.source(other))) for other in others(name, tasks.names("text"))]
    updates = {module: [(f := source.factors(module)).B @ f.A for source in sources] for module in fleet}
    return [
        inside("one V per layer", shared_inputs(fleet, updates)),
        inside("centred", centred(fleet, updates)),
    ]


def side_rows(bench: Bench, name: str) -> list[Method]:
    fleet, random = bench.basis(name), bench.control("random", name)
    return [
        inside("U fleet, V random", one_sided(fleet, random)),
        inside("U random, V fleet", one_sided(random, fleet)),
        *(inside(f"{a} out, {b} in", bench.basis(name, k=a, k_in=b)) for a, b in ((64, 4), (32, 8), (8, 32), (4, 64))),
    ]


def kind_rows(bench: Bench, name: str) -> list[Method]:
    """About 1,024 numbers in each kind; directions are at most as many as sources."""
    return [
        inside("factor r=8, k=16", bench.basis(name), coefficients="factor", r=8),
        inside("factor r=2, k=64", bench.basis(name, k=64), coefficients="factor", r=2),
        inside("diagonal k=80", bench.basis(name, k=80), coefficients="diagonal"),
        inside("directions (11)", bench.basis(name, directions=11), coefficients="directions"),
    ]


def metric_rows(bench: Bench, name: str) -> list[Method]:
    known = input_roots(make_model(bench.top(name), 2, 0), some_inputs(bench.task(name)))
    roots = {module: each["root"] for module, each in known.items()}
    sources: list[Any] = []
    for other in others(name, tasks.names("text")):
        folder = bench.source(other)
        config = LoraConfig.from_pretrained(str(folder))
        config.modules_to_save = None
        sources.append((scaled_inputs(load_file(folder / "adapter_model.safetensors"), roots), config))
    built = build_basis(sources, k=K, progress=False, leave_one_out=False)
    fleet = bench.basis(name)
    random = bench.control("random", name)
    principal = each_module(
        fleet, lambda module, one: ModuleBasis(U=one.U, V=known[module]["axes"][:K].contiguous()), "activation axes"
    )
    return [
        inside("metric, V back by Σ^½", from_activation_metric(built, roots, "forward")),
        inside("metric, V back by Σ^-½", from_activation_metric(built, roots, "inverse")),
        inside("U fleet, V activation axes", principal),
        inside("U random, V activation axes", one_sided(random, principal)),
    ]


def hybrid_rows(bench: Bench, name: str) -> list[Method]:
    fleet, base, random = bench.basis(name), bench.control("base-weights", name), bench.control("random", name)
    return [
        inside("half base weights", hybrid(fleet, base, K)),
        inside("half random", hybrid(fleet, random, K)),
        inside("quarter base weights", hybrid(fleet, base, K, 0.75)),
        inside("three quarters base weights", hybrid(fleet, base, K, 0.25)),
    ]


def start_rows(bench: Bench, name: str) -> list[Method]:
    fleet = bench.basis(name)
    return [inside("start at nearest source", fleet, start=nearest_source(bench, name, fleet))]


def gradient_rows(bench: Bench, name: str) -> list[Method]:
    """Directions that the loss wants before anything is trained: the task's own, of the examples that each seed draws, and those of the
    fleet's tasks, which are shared as a basis is."""
    fleet, task = bench.basis(name), bench.task(name)
    others_first = [
        first_gradients(make_model(bench.top(other), bench.task(other).outputs, 0), bench.task(other).splits["train"])
        for other in others(name, tasks.names("text"))
    ]
    shared = gradient_basis(fleet, others_first)

    @cache
    def own(seed: int) -> SubspaceBasis:
        some = task.splits["train"].take(torch.tensor(draw_examples(task, BRIEF, seed)[0]))
        return gradient_basis(fleet, [first_gradients(make_model(bench.top(name), task.outputs, 0), some)])

    return [
        inside("fleet", fleet),
        inside("half the fleet's first gradients", hybrid(fleet, shared, K)),
        inside_per_seed("half own first gradient", lambda seed: hybrid(fleet, own(seed), K)),
        inside_per_seed("own first gradient", own),
    ]


def mix_rows(bench: Bench, name: str) -> list[Method]:
    fleet = bench.basis(name)
    mixed = lambda seed: starting_at_mix(fleet, convex_mix(bench, name, fleet, BRIEF, seed))  # noqa: E731
    return [inside("fleet", fleet), inside_per_seed("start at a convex mix", mixed, start="mean")]


def started_rows(bench: Bench, name: str) -> list[Method]:
    return [
        inside("fleet", bench.basis(name)),
        inside("sources started by PiSSA", bench.basis(name, start="pissa")),
        inside("sources started by LoRA-GA", bench.basis(name, start="lora_ga")),
    ]


def fast_rows(bench: Bench, name: str) -> list[Method]:
    """The fleet's row at the rate at which it collapses now and then."""
    return [inside("fleet at 4 × the rate", bench.basis(name), rates=(CORE_RATES[-1],))]


def shape_rows(bench: Bench, name: str) -> list[Method]:
    """Many output directions and few input ones at the same numbers: what did best of the sides, on all tasks."""
    return [
        inside("fleet", bench.basis(name)),
        *(inside(f"{a} out, {b} in, all tasks", bench.basis(name, k=a, k_in=b)) for a, b in ((64, 4), (32, 8))),
    ]


def rate_rows(bench: Bench, name: str) -> list[Method]:
    """Rates between those of the sweeps, for the core and for LoRA alike."""
    assert bench.results is not None
    rows = []
    for row in (inside("fleet", bench.basis(name)), lora(8)):
        rate = usual_rate(bench.results, row.name, name)
        rows += [replace(row, rates=(rate,)), replace(row, name=f"{row.name} at half the rate", rates=(rate / 2,))]
    return rows


def source_rows(bench: Bench, name: str) -> list[Method]:
    return [inside("sources started at input axes", bench.basis(name, start="axes"))]


def quick() -> Experiment:
    """The first rows of the first three tasks of the main table, 40 steps."""
    return Experiment("main", list(ORDER[:3]), Budget(steps=40, checks=()), short_rows)


def experiments() -> dict[str, list[Experiment]]:
    """Group → experiments, in the order in which they are run."""
    few, digging, every = list(FEW), list(DIGGING), list(ORDER)
    small, large = Budget(examples=100, checks=()), Budget(examples=1000, steps=120, checks=())
    return {
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
        "controls": [Experiment("controls", few, BRIEF, as_fleet(control_rows))],
        "sizes": [
            Experiment(f"size-{WIDE}", every, BRIEF, sized_rows(WIDE)),
            Experiment("size-8", few, BRIEF, sized_rows(8)),
        ],
        "images": [
            Experiment("images", list(IMAGE_TASKS), BRIEF, lambda bench, name: main_rows(bench, name)[:5]),
            Experiment("images-more", list(IMAGE_TASKS), BRIEF, more_image_rows),
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
