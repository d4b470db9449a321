"""Rows, and the tables that say what happened."""

from __future__ import annotations

import json
from typing import Any

import common as shared
import pytest
import torch
from common import Method, RunCache, compare
from common.methods import candidates

from subspace_peft import SubspaceBasis, build_basis
from subspace_peft.errors import SubspaceError

from ...models import bert
from .conftest import Runs, head_only


@pytest.fixture
def random_basis(bases, tmp_path) -> SubspaceBasis:
    basis = build_basis(like=bases[bert], builder="random", directions=3, progress=False)
    basis.save_pretrained(tmp_path / "random")
    return basis


def given(bases, random: SubspaceBasis | None, **more: Any) -> dict[str, Any]:
    modules = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
    return {**modules, "basis": bases[bert], "random": random, **more}


@pytest.mark.parametrize("coefficients", ["core", "factor", "diagonal", "directions"])
def test_rows_train_what_was_planned(coefficients, bases, random_basis):
    more = {"coefficients": coefficients, "r": 2, "layers": [1]}
    rows = shared.methods(**given(bases, random_basis, **more))
    assert [row.name for row in rows] == ["head only", "mean only", "LoRA r=2", "VeRA", "random basis", "this basis"]
    with torch.device("meta"):
        empty = bert()
    plan = shared.planned_numbers(empty, target_modules=["query", "value"], k=6, directions=3, **more)
    assert plan["modules"] == 2 and plan["parameters"] == sum(p.numel() for p in bert().parameters())
    for row in rows:
        sizes = shared.measure(row.apply(bert(), "classifier"))
        assert sizes["trained_adapter"] == plan["rows"][row.name], row.name
        assert sizes["trained_head"] == plan["head"] == 2 * 32 + 2
        assert (sizes["bytes"] == 0) == (row.name == "head only")
        assert sizes["bytes"] < 4 * sizes["trained_adapter"] + 2500  # the file's header, and no basis in it


@pytest.mark.parametrize("coefficients", ["core", "factor"])
def test_candidates_are_rows_of_the_comparison_and_own_directions_as_planned(coefficients, bases, random_basis):
    more = {"coefficients": coefficients, "r": 2, "layers": [1], "alpha": 64.0, "k": 3, "mean_gain": "fixed"}
    rows = shared.methods(**given(bases, random_basis, **more, sweep=2))
    found = candidates(own=(1, 3), sweep=2, **{k: v for k, v in given(bases, None, **more).items() if k != "random"})
    assert [row.name for row in found] == ["this basis", "this basis + 1 own", "this basis + 3 own", "LoRA r=2"]
    # the same runs, so that a choice and a comparison share those of one seed
    for row in (found[0], found[-1]):
        same = shared.method_named(rows, row.name)
        assert (row.identity(), row.rates) == (same.identity(), same.rates)
    assert all(row.rates == rows[-1].rates for row in found[:-1])
    with torch.device("meta"):
        empty = bert()
    planned = {key: value for key, value in more.items() if key != "alpha"}
    plan = shared.planned_numbers(empty, target_modules=["query", "value"], own=(1, 3), **planned)["rows"]
    for row in found:
        assert shared.measure(row.apply(bert(), "classifier"))["trained_adapter"] == plan[row.name], row.name


def test_a_basis_in_memory_travels_with_its_tasks(bases):
    random = build_basis(like=bases[bert], builder="random", progress=False)
    row = shared.method_named(shared.methods(**given(bases, random)), "random basis")
    assert row.adapter().save_basis is True
    assert shared.measure(row.apply(bert(), "classifier"))["bytes"] > 4 * 4 * 2 * 6 * 32


def test_without_a_head_the_first_row_is_the_base_model(bases, random_basis):
    for more in ({"head": False, "task_type": None}, {"task_type": "CAUSAL_LM"}):
        row = shared.methods(**given(bases, random_basis, **more))[0]
        assert row.name == "base model" and row.rates == ()
    model = row.apply(bert(), None)
    assert shared.measure(model) == {"trained_adapter": 0, "trained_head": 0, "bytes": 0}


def test_rows_that_cannot_be_are_left_out(bases, random_basis):
    names = [row.name for row in shared.methods(**given(bases, None, coefficients="none"))]
    assert names == ["head only", "mean only", "LoRA r=8", "VeRA"]
    assert "random basis" not in [row.name for row in shared.methods(**given(bases, None))]
    only_random = given({bert: random_basis}, random_basis)
    assert "mean only" not in [row.name for row in shared.methods(**only_random)]
    with pytest.raises(SubspaceError, match="there are head only, mean only"):
        shared.method_named(shared.methods(**given(bases, None)), "LoRA")


@pytest.mark.parametrize(("sweep", "rates"), [(0, (3e-4, 1e-3, 4e-3, 1.2e-2)), (1, (1e-3,)), (2, (1e-3, 4e-3))])
def test_a_shorter_sweep_keeps_the_middle(sweep, rates, bases, random_basis):
    assert shared.methods(**given(bases, random_basis, sweep=sweep))[-1].rates == rates


def test_planned_modules_have_to_exist():
    with pytest.raises(SubspaceError, match="match no linear layer"):
        shared.planned_numbers(bert(), target_modules=["q_proj"], k=4)


# -- tables and curves ------------------------------------------------------------------------------------------------


def test_table_json_and_curves(tmp_path):
    runs = Runs(lambda rate: 0.4 if rate is None else 1.0 - abs(rate - 1e-2))
    rows = [Method("base model", None, ()), head_only(1e-2, 1e-1)]
    results = compare(rows, runs, seeds=(1, 2), cache=RunCache(tmp_path / "cells", {}), progress=False)
    text = shared.write_results(results, tmp_path / "out", title="A title", settings={"epochs": 4})
    assert (tmp_path / "out" / "table.md").read_text() == text
    lines = text.splitlines()
    assert lines[0] == "A title"
    assert lines[4] == "| base model | 0.200 | 1 | 1,536 | 770 | 7,216 | 2.0 | – |"
    assert lines[5] == "| head only | 0.508 ± 0.004 | 2 | 1,536 | 770 | 7,216 | 2.0 | 0.01 |"
    body = json.loads((tmp_path / "out" / "results.json").read_text())
    assert body == {"title": "A title", "settings": {"epochs": 4}, "results": results}
    edge = shared.markdown_table([{**results[1], "at_edge": True}])
    assert "| 0.01 * |" in edge and "a further one may be better" in edge
    diverged = {**results[1], "method": "x", "curves": [[[8, None], [16, None]]]}
    file = shared.draw_curves([*results, diverged], tmp_path / "out" / "curves.png", title="A title")
    assert file.read_bytes().startswith(b"\x89PNG") and not list((tmp_path / "out").glob(".*"))
