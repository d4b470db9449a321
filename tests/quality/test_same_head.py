"""The main tables' rows: random draws, keys, rates from two seeds, and the trial of heads."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.quality import bench as bench_module
from benchmarks.quality import same_head
from benchmarks.quality.choice import CHOICE
from benchmarks.quality.experiment import perform, usual_rate
from benchmarks.quality.rows import drawn_vera
from benchmarks.quality.same_head_tables import ROWS
from benchmarks.quality.training import BRIEF, HEAD_RATE

from .conftest import SMALL


def bases_of(row, seeds=(1, 2, 3)):
    return {seed: row.for_seed(seed).resolve().fingerprint for seed in seeds}


def test_random_directions_are_drawn_again_for_every_task_and_seed(bench):
    first, second = (bases_of(same_head.random_row(bench, name, k=4)) for name in ("one", "three"))
    assert len({*first.values(), *second.values()}) == 6
    # rows of one task and seed have one draw, so that what own directions add is paired
    own = same_head.random_row(bench, "one", "random + 1 own", 4, extra_rank=1)
    assert bases_of(own) == first and bases_of(same_head.random_row(bench, "one", k=4)) == first
    keys = [drawn_vera(4, lambda seed: same_head.draw_number("one", seed)).for_seed(seed) for seed in (1, 2)]
    assert len({config.projection_prng_key for config in keys}) == 2


def test_a_draw_is_part_of_a_runs_key(bench, monkeypatch):
    row = replace(same_head.random_row(bench, "one", k=4), rates=(1e-3,))
    assert row.identity(1) != row.identity(2) and row.identity(1) == row.identity(1)
    bench.compare("one", [row], SMALL)
    monkeypatch.setattr(bench_module, "train", lambda *_, **__: pytest.fail("trained again"))
    bench.compare("one", [row], SMALL)
    monkeypatch.setattr(same_head, "draw_number", lambda name, seed: 10 + seed)
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        bench.compare("one", [replace(same_head.random_row(bench, "one", k=4), rates=(1e-3,))], SMALL)


def test_the_draws_of_the_benchmark_are_all_different():
    names = [*same_head.ORDER, *same_head.IMAGE_TASKS]
    numbers = [same_head.draw_number(name, seed) for name in names for seed in (1, 2, 3, 4, 5)]
    assert len(set(numbers)) == len(numbers)


def test_rates_are_chosen_by_the_mean_of_two_seeds_whose_runs_are_reported_too(bench, monkeypatch, tmp_path):
    runs = []

    def scores(model, task, budget, rate, seed, *, curve):
        runs.append((rate, seed))
        value = {(4e-4, 1): 0.9, (4e-4, 2): 0.2}.get((rate, seed), 0.6 if rate == 1.6e-3 else 0.3)
        return {"validation": value, "curve": [[4, value]], "seconds": 0.0}

    monkeypatch.setattr(bench_module, "train", scores)
    bench.seeds = (1, 2, 3)
    experiment = same_head.swept("main", ["one"], SMALL, lambda bench, name: [same_head.lora(2)])
    perform(bench, experiment, tmp_path)
    body = json.loads((tmp_path / same_head.FOLDER / "main.json").read_text())
    row = body["tasks"]["one"][0]
    assert row["rate"] == 1.6e-3 and body["sweep_seeds"] == [1, 2] and body["seeds"] == [1, 2, 3]
    assert row["tried"][0][:2] == [4e-4, [0.9, 0.2]] and None not in row["tried"][0][2] and len(row["tests"]) == 3
    assert len(runs) == 7 and runs[-1] == (1.6e-3, 3)
    assert usual_rate(tmp_path / same_head.FOLDER, "LoRA r=2", "three") == 1.6e-3


def test_a_usual_rate_costs_only_the_runs_that_the_sweep_did_not_have(bench, monkeypatch, tmp_path):
    runs = []

    def scores(model, task, budget, rate, seed, *, curve):
        runs.append((task.name, rate, seed))
        best = 4e-4 if task.name == "one" else 1.6e-3
        return {"validation": 0.6 if rate == best else 0.3, "curve": [[4, 0.6]], "seconds": 0.0}

    monkeypatch.setattr(bench_module, "train", scores)
    bench.seeds, bench.results, bench.widenings = (1, 2, 3), tmp_path, 0
    rows = lambda bench, name: [same_head.lora(2)]  # noqa: E731
    perform(bench, same_head.swept("main", ["one", "three"], SMALL, rows), tmp_path)
    done = len(runs)
    perform(bench, same_head.swept("one-rate", ["one", "three"], SMALL, same_head.usual(rows)), tmp_path)
    assert runs[done:] == [("one", 1.6e-3, 3), ("three", 4e-4, 3)]


def test_the_trial_has_the_seeds_of_no_table_and_every_treatment_once():
    trials = same_head.groups()["head-trial"]
    assert {each.name for each in trials} == {f"head-trial-{name.replace(' ', '-')}" for name in same_head.HEADS}
    for each in trials:
        assert not each.tested and not {*each.seeds, *each.sweep_seeds} & {1, 2, 3}
        assert each.folder == same_head.FOLDER
    treatments = {(each.budget.head_start, each.budget.head_rate, tuple(each.head_rates)) for each in trials}
    assert len(treatments) == len(trials) and ("drawn", HEAD_RATE, ()) in treatments


def test_every_main_table_has_the_chosen_treatment_and_one_name_per_row(bench):
    chosen = same_head.HEADS[same_head.CHOSEN].budget(BRIEF)
    names = []
    for group, listed in same_head.groups().items():
        for each in listed if group != "head-trial" else ():
            assert (each.budget.head_start, each.budget.head_rate) == (chosen.head_start, chosen.head_rate)
            assert tuple(each.head_rates) == same_head.HEADS[same_head.CHOSEN].joint
            assert tuple(each.sweep_seeds) == same_head.SWEEP_SEEDS and each.tested
    for rows in (same_head.first_rows, same_head.more_rows, same_head.other_rows):
        names += [row.name for row in rows(bench, "one")]
    assert (
        len(set(names)) == len(names)
        and set(names) | {CHOICE} == set(ROWS)
        and names[:4] == ["head only", "LoRA r=8", "fleet", "random"]
    )
