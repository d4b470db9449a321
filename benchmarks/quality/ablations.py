"""What was tried to make the fleet's row better, by the letters of its experiments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from common import Method
from peft import LoraConfig
from safetensors.torch import load_file

from subspace_peft import SubspaceBasis, build_basis
from subspace_peft.basis import ModuleBasis
from subspace_peft.sources import open_source

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
from .bench import Bench, K
from .experiment import usual_rate
from .fleet import others, some_inputs
from .gradients import first_gradients, gradient_basis
from .rows import CORE_RATES, inside, inside_per_seed, lora
from .starts import convex_mix, nearest_source, starting_at_mix
from .training import BRIEF, draw_examples, make_model


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
    """Return rows of about 1,024 parameters in each kind; directions are at most as many as sources."""
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
    principal = activation_axes(fleet, known)
    return [
        inside("metric, V back by Σ^½", from_activation_metric(built, roots, "forward")),
        inside("metric, V back by Σ^-½", from_activation_metric(built, roots, "inverse")),
        inside("U fleet, V activation axes", principal),
        inside("U random, V activation axes", one_sided(random, principal)),
    ]


def activation_axes(fleet: SubspaceBasis, known: Mapping[str, Any]) -> SubspaceBasis:
    """Return a basis of the fleet's U and, for V, the leading principal axes of the inputs."""

    def change(module: str, one: ModuleBasis) -> ModuleBasis:
        return ModuleBasis(U=one.U, V=known[module]["axes"][:K].contiguous())

    return each_module(fleet, change, "activation axes")


def activation_rows(bench: Bench, name: str) -> list[Method]:
    fleet = bench.basis(name)
    known = input_roots(make_model(bench.top(name), 2, 0), some_inputs(bench.task(name)))
    return [
        inside("fleet", fleet),
        inside("half of V activation axes", hybrid(fleet, activation_axes(fleet, known), K)),
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
    """Return rows in the directions that the loss wants before anything is trained.

    The task's own, of the examples that each seed draws, and those of the fleet's tasks, which are shared as a basis
    is.
    """
    fleet = bench.basis(name)
    shared = gradient_basis(fleet, [bench.first_gradients(other) for other in others(name, tasks.names("text"))])
    own = own_gradient(bench, name, fleet)
    return [
        inside("fleet", fleet),
        inside("half the fleet's first gradients", hybrid(fleet, shared, K)),
        inside_per_seed("half own first gradient", lambda seed: hybrid(fleet, own(seed), K)),
        inside_per_seed("own first gradient", own),
    ]


def few_gradient_rows(bench: Bench, name: str) -> list[Method]:
    """Return rows with a few directions of the task's own first gradient behind the fleet's leading ones.

    They would have to be stored with the task.
    """
    fleet = bench.basis(name)
    own = own_gradient(bench, name, fleet)
    return [
        inside("fleet", fleet),
        *(
            inside_per_seed(
                f"{count} of 16 from own first gradient",
                lambda seed, count=count: hybrid(fleet, own(seed), K, 1 - count / K),
            )
            for count in (1, 2, 4)
        ),
    ]


def own_gradient(bench: Bench, name: str, fleet: SubspaceBasis) -> Callable[[int], SubspaceBasis]:
    """Return a function: seed → the basis of the task's first gradient on the examples that the seed draws."""

    @cache
    def of_seed(seed: int) -> SubspaceBasis:
        task = bench.task(name)
        some = task.splits["train"].take(torch.tensor(draw_examples(task, BRIEF, seed)[0]))
        return gradient_basis(fleet, [first_gradients(make_model(bench.top(name), task.outputs, 0), some)])

    return of_seed


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
    """Return the fleet's row at the rate at which it collapses now and then."""
    return [inside("fleet at 4 × the rate", bench.basis(name), rates=(CORE_RATES[-1],))]


def shape_rows(bench: Bench, name: str) -> list[Method]:
    """Return rows with many output directions and few input ones, at the same number of parameters.

    These did best of the sides; here on all tasks.
    """
    return [
        inside("fleet", bench.basis(name)),
        *(inside(f"{a} out, {b} in, all tasks", bench.basis(name, k=a, k_in=b)) for a, b in ((64, 4), (32, 8))),
    ]


def rate_rows(bench: Bench, name: str) -> list[Method]:
    """Return rows at rates between those of the sweeps, for the core and for LoRA alike."""
    assert bench.results is not None
    rows = []
    for row in (inside("fleet", bench.basis(name)), lora(8)):
        rate = usual_rate(bench.results, row.name, name)
        rows += [replace(row, rates=(rate,)), replace(row, name=f"{row.name} at half the rate", rates=(rate / 2,))]
    return rows


def source_rows(bench: Bench, name: str) -> list[Method]:
    return [inside("sources started at input axes", bench.basis(name, start="axes"))]
