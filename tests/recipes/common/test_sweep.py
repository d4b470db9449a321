"""Sweeps that widen, runs that resume."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import common as shared
import pytest
from common import Method, RunCache, compare

from subspace_peft import SubspaceBasis, build_basis
from subspace_peft.errors import SubspaceError

from ...models import bert
from .conftest import Runs, head_only, result, run_one


@pytest.mark.parametrize(
    ("optimum", "tried", "at_edge"),
    [
        (1e-2, [1e-3, 1e-2, 1e-1], False),
        (1e0, [1e-3, 1e-2, 1e-1, 1e0, 1e1], False),
        (1e3, [1e-3, 1e-2, 1e-1, 1e0, 1e1], True),
        (1e-4, [1e-5, 1e-4, 1e-3, 1e-2, 1e-1], False),
        (1e-9, [1e-5, 1e-4, 1e-3, 1e-2, 1e-1], True),
    ],
)
def test_a_best_rate_at_the_edge_widens_the_sweep_by_its_ratio_at_most_twice(optimum, tried, at_edge, tmp_path):
    runs = Runs(lambda rate: 10 - abs(math.log10(rate / optimum)))
    row = run_one(head_only(1e-3, 1e-2, 1e-1), runs, tmp_path)
    assert [entry["rate"] for entry in row["sweep"]] == pytest.approx(tried)
    assert row["rate"] == pytest.approx(min(tried, key=lambda rate: abs(math.log10(rate / optimum))))
    assert row["at_edge"] is at_edge
    assert row["seeds"] == [1, 2, 3]
    assert [call for call in runs.calls if call[2] != 0] == [("head only", row["rate"], seed) for seed in (1, 2, 3)]


def test_equal_scores_go_to_the_smaller_rate(tmp_path):
    runs = Runs(lambda rate: 0.8 if rate in (1e-2, 1e-1) else 0.5)
    assert run_one(head_only(1e-3, 1e-2, 1e-1), runs, tmp_path)["rate"] == 1e-2


def test_several_seeds_choose_the_rate_by_their_mean(tmp_path):
    scores = {(1e-3, 1): 0.9, (1e-3, 2): 0.1, (1e-2, 1): 0.6, (1e-2, 2): 0.6, (1e-1, 1): 0.2, (1e-1, 2): 0.8}
    calls: list[tuple[float, int]] = []

    def run(method: Method, rate: float | None, seed: int) -> dict[str, Any]:
        assert rate is not None
        calls.append((rate, seed))
        return result(scores.get((rate, seed), 0.3))

    row = run_one(head_only(1e-3, 1e-2, 1e-1), run, tmp_path, sweep_seeds=(1, 2))
    assert row["rate"] == 1e-2 and [entry["validation"] for entry in row["sweep"]] == pytest.approx([0.5, 0.6, 0.5])
    assert row["sweep"][1]["validations"] == [0.6, 0.6] and row["sweep"][1]["tests"] == [0.3, 0.3]
    # the sweep's runs are the report's, where a seed is both
    assert len(calls) == 7 and calls[-1] == (1e-2, 3) and row["tests"] == pytest.approx([0.3, 0.3, 0.15])
    alone = run_one(head_only(1e-3, 1e-2, 1e-1), run, tmp_path, sweep_seed=1)
    assert alone["rate"] == pytest.approx(1e-3) and "validations" not in alone["sweep"][0]


def test_a_rate_that_diverges_with_one_seed_of_several_is_not_chosen(tmp_path):
    def run(method: Method, rate: float | None, seed: int) -> dict[str, Any]:
        return result(math.nan if (rate, seed) == (1e-2, 2) else 0.9 if rate == 1e-2 else 0.5)

    row = run_one(head_only(1e-3, 1e-2, 1e-1), run, tmp_path, sweep_seeds=(1, 2), widenings=0)
    assert row["rate"] == 1e-3 and row["sweep"][1]["validation"] is None
    assert row["sweep"][1]["validations"] == [0.9, None]


def test_one_rate_is_no_sweep_to_widen(tmp_path):
    row = run_one(head_only(1e-2), Runs(lambda rate: 0.5), tmp_path)
    assert row["at_edge"] and len(row["sweep"]) == 1


def test_the_test_score_chooses_nothing(tmp_path):
    def run(method: Method, rate: float | None, seed: int) -> dict[str, Any]:
        return result(1.0 if rate == 1e-2 else 0.5, test=0.1 if rate == 1e-2 else 0.9)

    row = compare([head_only(1e-3, 1e-2, 1e-1)], run, cache=RunCache(tmp_path, {}), progress=False)[0]
    assert row["rate"] == 1e-2 and row["test"] == pytest.approx(0.1)


def test_a_sweeps_run_without_a_test_is_run_again_only_where_its_seed_is_reported(tmp_path):
    calls: list[int] = []

    def run(method: Method, rate: float | None, seed: int) -> dict[str, Any]:
        calls.append(seed)
        reported = seed in seeds
        return {**result(0.5, test=0.4 if reported else None), "metrics": {"a": 1.0} if reported else None}

    seeds = (1,)
    assert run_one(head_only(1e-2), run, tmp_path, seeds=seeds)["tests"] == [0.4] and calls == [0, 1]
    seeds = (0, 1)
    assert run_one(head_only(1e-2), run, tmp_path, seeds=seeds)["tests"] == [0.4, 0.4] and calls == [0, 1, 0]
    assert run_one(head_only(1e-2), run, tmp_path, seeds=seeds)["tests"] == [0.4, 0.4] and calls == [0, 1, 0]


def test_diverged_runs_lose_are_kept_and_are_reported(tmp_path):
    runs = Runs(lambda rate: math.nan if rate > 5e-3 else math.inf if rate > 2e-3 else 0.6)
    row = run_one(head_only(5e-4, 1e-3, 1e-2), runs, tmp_path)
    assert row["rate"] == 1.25e-4 and row["at_edge"]  # equals go to the smaller, which is at the edge twice
    assert row["sweep"][-1] == {"rate": 1e-2, "validation": None, "seconds": 2.0}
    assert row["diverged"] == 0

    def run(method: Method, rate: float | None, seed: int) -> dict[str, Any]:
        return result(0.5, test=math.nan if seed == 2 else 0.4)

    row = compare([head_only(1e-2)], run, cache=RunCache(tmp_path, {"task": "other"}), progress=False)[0]
    assert row["diverged"] == 1 and row["tests"] == [0.4, None, 0.4]
    assert row["test"] is None and row["test_sd"] is None
    assert "diverged in 1 of 3 (others: 0.400, 0.400)" in shared.markdown_table([row])
    json.dumps(row, allow_nan=False)


def test_all_runs_diverged_is_a_result_too(tmp_path):
    row = run_one(head_only(1e-3, 1e-2), Runs(lambda rate: math.nan), tmp_path)
    assert row["diverged"] == 3 and row["rate"] == pytest.approx(1e-5) and row["at_edge"]


def test_a_method_without_rates_is_run_once(tmp_path):
    runs = Runs(lambda rate: 0.4)
    row = run_one(Method("base model", None, ()), runs, tmp_path)
    assert runs.calls == [("base model", None, 1)]
    assert row["rate"] is None and row["test"] == pytest.approx(0.2) and row["test_sd"] is None and not row["at_edge"]


def test_mean_and_spread(tmp_path):
    row = run_one(head_only(1e-2), Runs(lambda rate: 0.5), tmp_path, seeds=(1, 2, 3))
    assert row["tests"] == pytest.approx([0.255, 0.26, 0.265])
    assert row["test"] == pytest.approx(0.26) and row["test_sd"] == pytest.approx(0.005)
    assert row["seconds"] == 2.0 and len(row["curves"]) == 3


@pytest.mark.parametrize(
    ("methods", "more", "says"),
    [
        ([head_only(1e-2), head_only(1e-3)], {}, "one name"),
        ([head_only(1e-2)], {"seeds": ()}, "at least one"),
        ([head_only(1e-2)], {"seeds": (1, 1)}, "each once"),
        ([head_only(1e-2)], {"sweep_seeds": (1, 1)}, r"sweep_seeds=\[1, 1\]: .* each once"),
        ([head_only(1e-2)], {"sweep_seeds": ()}, "sweep_seeds=.*at least one"),
    ],
)
def test_bad_comparisons_are_refused(methods, more, says, tmp_path):
    runs = Runs(lambda rate: 0.5)
    with pytest.raises(SubspaceError, match=says):
        compare(methods, runs, cache=RunCache(tmp_path, {}), progress=False, **more)
    assert runs.calls == []


@pytest.mark.parametrize("rates", [(1e-2, 1e-3), (1e-3, 1e-3), (0.0, 1.0), (math.nan,), (1.0, math.inf)])
def test_rates_are_ascending_and_sensible(rates):
    with pytest.raises(SubspaceError, match="ascending"):
        head_only(*rates)


def test_an_adapter_needs_rates():
    with pytest.raises(SubspaceError, match="at least one"):
        Method("LoRA", lambda: None, ())


def test_a_run_that_lacks_a_key_is_refused(tmp_path):
    with pytest.raises(SubspaceError, match="returned no test, curve"):
        compare(
            [head_only(1e-2)],
            lambda *_: {k: v for k, v in result(0.5).items() if k not in ("test", "curve")},
            cache=RunCache(tmp_path, {}),
            progress=False,
        )


# -- finished runs ----------------------------------------------------------------------------------------------------


def test_an_interrupted_comparison_resumes(tmp_path):
    runs = Runs(lambda rate: 0.5 - abs(rate - 1e-2))

    def interrupted(method: Method, rate: float | None, seed: int) -> dict[str, Any]:
        if seed == 2:
            raise KeyboardInterrupt
        return runs(method, rate, seed)

    with pytest.raises(KeyboardInterrupt):
        run_one(head_only(1e-3, 1e-2, 1e-1), interrupted, tmp_path)
    before = list(runs.calls)
    row = run_one(head_only(1e-3, 1e-2, 1e-1), runs, tmp_path)
    assert runs.calls[len(before) :] == [("head only", 1e-2, 2), ("head only", 1e-2, 3)]
    again = Runs(lambda rate: 0.0)
    assert run_one(head_only(1e-3, 1e-2, 1e-1), again, tmp_path) == row and again.calls == []


DAMAGES = {
    "cut off": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "no object": lambda text: "[1, 2]",
    "an edited score": lambda text: text.replace('"validation": 0.5', '"validation": 0.9'),
    "of another run": lambda text: text.replace('"seed": 0', '"seed": 5'),
    "not UTF-8": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cell_is_run_again(damage, tmp_path, caplog):
    runs = Runs(lambda rate: 0.5)
    row = run_one(head_only(1e-2), runs, tmp_path)
    file = RunCache(tmp_path, {"task": "t"}).file(head_only(1e-2), 1e-2, 0)
    change = DAMAGES[damage]
    file.write_bytes(b"\xff\xfe{" if change is None else change(file.read_text()).encode())
    runs.calls.clear()
    assert run_one(head_only(1e-2), runs, tmp_path) == row
    assert runs.calls == [("head only", 1e-2, 0)]
    assert file.name in caplog.text and "damaged" in caplog.text


def test_another_setting_seed_rate_or_basis_is_another_cell(bases, tmp_path):
    random = build_basis(like=bases[bert], builder="random", progress=False)

    def rows(basis: SubspaceBasis, **more: Any) -> Method:
        given = {
            "task_type": "SEQ_CLS",
            "target_modules": ["query", "value"],
            "basis": basis,
            "random": random,
            **more,
        }
        return shared.method_named(shared.methods(**given), "this basis")

    cache, method = RunCache(tmp_path, {"task": "t"}), rows(bases[bert])
    files = [
        cache.file(method, 1e-2, 0),
        cache.file(method, 2e-2, 0),
        cache.file(method, 1e-2, 1),
        RunCache(tmp_path, {"task": "u"}).file(method, 1e-2, 0),
        cache.file(rows(random), 1e-2, 0),
        cache.file(rows(bases[bert], k=3), 1e-2, 0),
        cache.file(rows(bases[bert], coefficients="factor"), 1e-2, 0),
        cache.file(rows(bases[bert], layers=[1]), 1e-2, 0),
    ]
    assert len(set(files)) == len(files)
    moved = bases[bert].save_pretrained(tmp_path / "elsewhere")
    assert cache.file(rows(SubspaceBasis.from_pretrained(moved)), 1e-2, 0) == files[0]
    assert cache.file(dataclasses.replace(method, rates=(1.0, 2.0)), 1e-2, 0) == files[0]
