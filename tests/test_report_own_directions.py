"""How many directions of their own a report says that adapters need beside the basis, and what follows from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from subspace_peft import build_basis, compress_fleet
from subspace_peft.energy import FAITHFUL
from subspace_peft.errors import SubspaceError
from subspace_peft.report import report_basis
from subspace_peft.report.advice import NEW_TASKS, NEXT_TASKS, with_directions
from subspace_peft.report.headlines import headlines
from subspace_peft.report.own_directions import MOST, directions_needed, left_by_direction, needed_by_all
from subspace_peft.report.page import page
from subspace_peft.report.verdict import verdict
from subspace_peft.sources.factors import Factors

from .test_build import deltas, fleet
from .test_streaming import saved_fleet, shared_fleet


@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_shares_are_those_of_the_dense_residual(k: int) -> None:
    states = fleet(n=3)
    module = build_basis(states, k=k, progress=False)["a.q"]
    for state, dense in zip(states, deltas(states), strict=True):
        update = Factors(state["a.q.lora_B.weight"], state["a.q.lora_A.weight"])
        left = left_by_direction(module, update, module.project((update.B, update.A)))
        U, V = module.U.double(), module.V.double()
        rest = torch.linalg.svdvals(dense - U @ (U.T @ dense @ V.T) @ V).square() / dense.square().sum()
        torch.testing.assert_close(torch.tensor(left, dtype=torch.float64), rest[: len(left)], atol=1e-10, rtol=0)
        assert float(rest[len(left) :].sum()) < 1e-10


NEEDED = [
    # kept, left, norms, directions
    ({"a": 0.96}, {"a": [0.04]}, {"a": 1.0}, 0),
    ({"a": 0.90}, {"a": [0.04, 0.02, 0.01]}, {"a": 1.0}, 2),
    ({"a": 0.00}, {"a": [0.50, 0.45, 0.05]}, {"a": 3.0}, 2),
    # over modules together: the large one decides
    ({"a": 0.90, "b": 0.10}, {"a": [0.06, 0.04], "b": [0.2] * 4}, {"a": 10.0, "b": 1.0}, 1),
    ({"a": 0.97, "b": 0.10}, {"a": [0.03], "b": [0.2] * 4}, {"a": 10.0, "b": 1.0}, 0),
    ({"a": 0.0}, {"a": [0.01] * MOST}, {"a": 1.0}, None),
    ({"a": 0.2}, {"a": [0.1, 0.05]}, {"a": 1.0}, None),
    ({}, {}, {}, None),
]


@pytest.mark.parametrize(("kept", "left", "norms", "count"), NEEDED)
def test_as_few_as_reach_the_faithful_share(
    kept: dict[str, float | None], left: dict[str, list[float]], norms: dict[str, float], count: int | None
) -> None:
    assert directions_needed(kept, left, norms) == count


def test_a_fleet_needs_as_many_as_the_one_that_needs_most() -> None:
    assert needed_by_all([0, 2, 1]) == 2
    assert needed_by_all([0, None]) is None
    assert needed_by_all([]) is None


def test_a_residual_of_as_many_makes_every_adapter_faithful(tmp_path: Any) -> None:
    folders = saved_fleet(tmp_path / "loras", shared_fleet(n=5))
    basis = build_basis(folders, k=4, progress=False)
    basis.save_pretrained(tmp_path / "basis")
    found = report_basis(basis, folders, progress=False)
    rank = found.numbers["extra_rank"]
    assert rank >= 1 and found.numbers["bytes_per_direction"] == 4 * 2 * (120 + 90)
    made = compress_fleet(folders, basis, tmp_path / "bundle", residual=rank, min_energy=FAITHFUL, progress=False)
    # fitted together with the cores fewer may do
    used = max(each.residual_rank for each in made.adapters)
    assert len(made.adapters) == 5 and 1 < used <= rank
    with pytest.raises(SubspaceError, match="cannot be compressed"):
        compress_fleet(folders, basis, tmp_path / "less", residual=used - 1, min_energy=FAITHFUL, progress=False)
    assert any(entry["extra_rank"] == rank for entry in found.sources)
    shown = page(found)
    assert f'data-label="own directions">{rank}</td>' in shown
    assert f'where there are any</td><td class="n">{rank}</td>' in shown


BASE: dict[str, Any] = {
    "kept": 0.9,
    "kept_of_new": None,
    "null_kept": 0.2,
    "unseen": 0.2,
    "random": 0.001,
    "mean_only": 0.0,
    "k_for_share": 40,
    "above": (1, 1),
    "k_for_new_tasks": None,
    "bytes_per_lora": 1000,
    "bytes_per_task": 100,
    "bytes_of_basis": 500,
    "bytes_per_direction": 200,
    "extra_rank": 3,
    "break_even": 2,
    "sources": 9,
    "built_from": 9,
    "in_seed_groups": 0,
}
ADVICE = [
    # what is known, the class that decides, the words
    ({}, ("partial", 3), "compress --min-energy 0.95 --residual 3`"),
    ({"extra_rank": 5}, ("poor", None), "keep these adapters as LoRAs, or build with a larger k"),
    ({"extra_rank": 4}, ("partial", 4), "compress --min-energy 0.95 --residual 4`"),
    # nine tasks are smaller than nine LoRAs, but not with their basis
    ({"extra_rank": 4, "bytes_of_basis": 1000}, ("poor", None), "keep these adapters as LoRAs, or build"),
    ({"extra_rank": None}, ("partial", None), "compress --min-energy 0.95 --residual RANK`"),
    ({"extra_rank": 0, "kept": 0.97}, ("faithful", None), "`subspace-peft compress`"),
    ({"kept": 0.6}, ("partial", 3), "compress --min-energy 0.95 --residual 3`"),
    ({"kept": 0.6, "extra_rank": 5}, ("poor", None), "keep these adapters as LoRAs, or build with a larger k"),
    ({"kept": 0.6, "null_kept": 0.6, "extra_rank": 5}, ("poor", None), "keep these adapters as LoRAs; for"),
    ({"kept": None, "kept_of_new": 0.6}, ("partial", 3), "or build a basis of them"),
    ({"kept": None, "kept_of_new": 0.6, "sources": 1}, ("partial", 3), "`subspace-peft project --extra-rank 3`"),
    (
        {"kept": None, "kept_of_new": 0.6, "sources": 1, "extra_rank": 5},
        ("poor", None),
        "keep these adapters as LoRAs",
    ),
]


@pytest.mark.parametrize(("given", "decided", "words"), ADVICE)
def test_what_the_verdict_says_to_do_with_adapters(
    given: dict[str, Any], decided: tuple[str, int | None], words: str
) -> None:
    numbers = {**BASE, **given}
    assert with_directions(numbers) == decided
    line = next(line for line in verdict(numbers) if line.startswith("Next: "))
    assert words in line and "{" not in line
    command = headlines(numbers, "b")[0].command
    assert ("--residual" in command) == (decided[0] == "partial")
    assert f"--residual {decided[1] or 4} " in command or decided[0] != "partial"


def test_adapters_that_are_new_to_the_basis_are_told_what_they_need(tmp_path: Any) -> None:
    folders = saved_fleet(tmp_path / "loras", shared_fleet(n=5))
    basis = build_basis(folders[:4], k=24, progress=False)
    found = report_basis(basis, folders, progress=False)
    assert [entry["in_basis"] for entry in found.sources] == [True] * 4 + [False]
    own, new = found.numbers["extra_rank"], found.numbers["extra_rank_of_new"]
    assert own == max(entry["extra_rank"] for entry in found.sources[:4]) < found.sources[4]["extra_rank"] == new
    assert f"; with {new} directions of its own beside it each is faithful." in found.verdict[0]
    alone = report_basis(basis, folders[4:], progress=False)
    assert alone.numbers["extra_rank"] == new


@pytest.mark.parametrize(("share", "known"), [(0.002, "unrelated"), (0.03, "little"), (0.2, "part"), (0.7, "mostly")])
def test_what_the_verdict_says_of_new_tasks_that_it_does_not_cover(share: float, known: str) -> None:
    numbers = {**BASE, "unseen": share}
    new, line = headlines(numbers, "b")[1], " ".join(verdict(numbers))
    assert new.word == known and new.sentence == NEW_TASKS[known] and NEXT_TASKS[known] in line
    covered = known == "mostly"
    assert ("add 2 directions of the task's own" in new.advice) != covered
    assert ("extra_rank=2" in line) != covered
    assert ("extra_rank=2" in new.command) == (known in ("little", "part"))
