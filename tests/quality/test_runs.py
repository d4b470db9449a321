"""Experiments: rows, caching, going on, usual rates."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model

from benchmarks.quality import bench as bench_module
from benchmarks.quality.bench import OutOfTime
from benchmarks.quality.experiment import Experiment, perform, usual_rate
from benchmarks.quality.rows import head_only, inside, lora, vera
from benchmarks.quality.training import Budget, make_model, outputs_of
from subspace_peft.errors import SubspaceError

from .conftest import NAMES, SMALL, top_of, toy


def test_a_row_may_depend_on_the_seeds_examples(bench):
    from benchmarks.quality.rows import inside_per_seed

    asked = []

    def make(seed):
        asked.append(seed)
        return bench.control("random", "one", 4, seed=seed)

    row = inside_per_seed("per seed", make)
    found = bench.compare("one", [replace(row, rates=(1e-3,))], SMALL)
    assert sorted(asked) == [1, 2] and len(found[0]["tests"]) == 2


def test_own_directions_train_beside_the_core_at_the_rate_of_the_core_alone(bench, tmp_path):
    from benchmarks.quality.own_directions import own_rows, own_usual_rows

    rates = {"fleet": 2e-3, "random": 3e-3, "LoRA r=1": 4e-3}
    sweeps = [{"method": method, "sweep": [[rate, 0.5]]} for method, rate in rates.items()]
    (tmp_path / "main.json").write_text(json.dumps({"experiment": "main", "tasks": {"three": sweeps}}))
    bench.results = tmp_path
    rows = {row.name: row for row in own_usual_rows(bench, "one")}
    assert [row.name for row in own_rows(bench, "one")] == list(rows)
    assert {name: row.rates for name, row in rows.items() if "own" in name} == {
        **{f"fleet + {count} own": (2e-3,) for count in (1, 2, 4)},
        **{f"random + {count} own": (3e-3,) for count in (1, 2)},
    }
    assert all(row.rates == (4e-3,) for name, row in rows.items() if name.startswith("LoRA"))
    found = {row["method"]: row for row in bench.compare("one", [rows["fleet"], rows["fleet + 2 own"]], SMALL)}
    # two layers of query and value, 16 in and out
    assert found["fleet + 2 own"]["trained_adapter"] - found["fleet"]["trained_adapter"] == 4 * 2 * (16 + 16)
    assert None not in found["fleet + 2 own"]["tests"]


@pytest.mark.slow
def test_every_experiments_rows_can_be_trained(bench, monkeypatch):
    from benchmarks.quality import experiments as listed
    from benchmarks.quality import same_head, same_head_tables, starts, tables

    for name, value in (("SENTIMENT", NAMES), ("TOPIC", NAMES), ("IMAGES", NAMES)):
        monkeypatch.setattr(bench_module.tasks, name, value)
    monkeypatch.setattr(starts, "FIT", 20)
    monkeypatch.setattr(starts, "HELD", 12)
    sweeps = [
        {"method": m, "sweep": [[1e-3, 0.5]]} for m in {*tables.MAIN_ORDER, *same_head_tables.ROWS} - {"mean only"}
    ]
    sweeps.append({"method": "mean only", "sweep": [[1e-1, 0.5]]})
    for folder in (bench.folder, bench.folder / same_head.FOLDER):
        folder.mkdir(exist_ok=True)
        (folder / "main.json").write_text(json.dumps({"experiment": "main", "tasks": {"three": sweeps}}))
    bench.results = bench.folder
    for group in listed.experiments().values():
        for experiment in group:
            rows = experiment.rows(bench, "one")
            assert len({row.name for row in rows}) == len(rows)
            for row in rows:
                if (config := row.for_seed(1)) is not None:
                    model = get_peft_model(make_model(top_of(), 2, 0), config)
                    assert torch.isfinite(outputs_of(model, toy("one").splits["test"])).all()


def test_finished_runs_are_never_done_twice(bench, monkeypatch):
    methods = [head_only(), lora(2), inside("random", bench.control("random", "one", 4))]
    first = bench.compare("one", methods, SMALL)
    assert all(len(row["tests"]) == 2 and None not in row["tests"] for row in first)

    def never(*_, **__):
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(bench_module, "train", never)
        assert bench.compare("one", methods, SMALL) == first
        # whatever decides a run is in its key
        with pytest.raises(AssertionError, match="trained again"):
            bench.compare("one", methods, Budget(examples=24, steps=5, batch=8, checks=(2,)))
        with pytest.raises(AssertionError, match="trained again"):
            bench.compare("one", [inside("random", bench.control("random", "one", 4, seed=1))], SMALL)


def test_an_interrupted_experiment_keeps_what_is_done_and_goes_on(bench, tmp_path):
    experiment = Experiment("main", ["one", "three"], SMALL, lambda bench, name: [head_only(), vera(4)])
    bench.until = 0
    with pytest.raises(OutOfTime):
        perform(bench, experiment, tmp_path / "results")
    assert not (tmp_path / "results" / "main.json").exists()
    bench.until = float("inf")
    perform(bench, experiment, tmp_path / "results")
    body = json.loads((tmp_path / "results" / "main.json").read_text())
    assert list(body["tasks"]) == ["one", "three"] and [row["method"] for row in body["tasks"]["one"]] == [
        "head only",
        "VeRA r=4",
    ]


def test_the_usual_rate_comes_from_the_other_tasks_only(tmp_path):
    def body(sweep: list) -> list[dict]:
        return [{"method": "fleet", "sweep": sweep}]

    tasks = {
        "a": body([[0.1, 0.9], [0.2, 0.1], [0.3, 0.1]]),
        "b": body([[0.1, 0.3], [0.2, 0.5], [0.4, 0.9]]),
        "c": body([[0.1, None], [0.2, 0.6]]),
    }
    (tmp_path / "main.json").write_text(json.dumps({"experiment": "main", "tasks": tasks}))
    assert usual_rate(tmp_path, "fleet", "a") == 0.2 and usual_rate(tmp_path, "fleet", "b") == 0.1
    with pytest.raises(SubspaceError, match="no sweep of 'hybrid'"):
        usual_rate(tmp_path, "hybrid", "a")


def test_the_quick_run_writes_its_results_and_is_not_done_twice(toys, tmp_path, monkeypatch, capsys):
    from benchmarks.quality import run

    monkeypatch.setattr(run, "ORDER", NAMES)
    monkeypatch.setattr(run, "Budget", lambda **_: SMALL)
    monkeypatch.setattr(
        run, "quick", lambda: Experiment("main", NAMES[:2], SMALL, lambda bench, name: [head_only(), lora(2)])
    )
    arguments = ["--quick", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    run.main(arguments)
    found = json.loads((tmp_path / "out" / "main.json").read_text())
    assert list(found["tasks"]) == ["one", "three"]
    assert all(len(row["tests"]) == 2 for rows in found["tasks"].values() for row in rows)
    with monkeypatch.context() as patch:
        patch.setattr(bench_module, "train", lambda *_, **__: pytest.fail("trained again"))
        run.main(arguments)
    assert len(json.loads((tmp_path / "out" / "machine.json").read_text())["runs"]) == 2
    with pytest.raises(SystemExit):
        run.main([*arguments, "images"])
    assert "--quick has rows of its own" in capsys.readouterr().err


def test_the_quick_runs_rows_are_of_the_main_table():
    from benchmarks.quality.same_head import groups, quick

    first = groups()["same-head"][0]
    assert set(quick().held_out) <= set(first.held_out) and len(quick().held_out) == 3
    assert quick().rows is first.rows and quick().sweep_seeds == first.sweep_seeds and quick().folder == first.folder
    heads = [(each.budget.head_start, each.budget.head_rate) for each in (quick(), first)]
    assert heads[0] == heads[1]
