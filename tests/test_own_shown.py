"""What is said of a task with directions of its own: `inspect`, its card, how it is printed."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from subspace_peft import SubspaceConfig, build_basis, bundle_tasks
from subspace_peft._shown import said_of_directions
from subspace_peft.cards import task_card
from subspace_peft.cli.main import main
from subspace_peft.report import inspect_path
from subspace_peft.tasks import read_task

from .models import bert, randomise, train_lora
from .test_cards import BARE_TASK, TASK

MODULES = [f"bert.encoder.layer.{layer}.attention.self.{side}" for layer in (0, 1) for side in ("query", "value")]
FIRST = MODULES[0]
KINDS = {
    "none": ({}, [0, 0, 0, 0]),
    "every module": ({"extra_rank": 2}, [2, 2, 2, 2]),
    "some": ({"extra_rank_pattern": {FIRST: 3}}, [3, 0, 0, 0]),
    "with a gain": ({"extra_rank": 1, "coefficients": "none", "mean_gain": "trainable"}, [1, 1, 1, 1]),
}


@pytest.fixture(scope="module")
def basis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("basis")
    train_lora(bert, folder / "lora", seed=1)
    build_basis([folder / "lora"], k=4, progress=False).save_pretrained(folder / "basis")
    return folder / "basis"


@pytest.fixture(params=KINDS)
def task(request: pytest.FixtureRequest, basis: Path, tmp_path: Path) -> tuple[Path, dict[str, int]]:
    given, counts = KINDS[request.param]
    randomise(get_peft_model(bert(), SubspaceConfig(basis=str(basis), alpha=8.0, **given))).save_pretrained(
        tmp_path / "task"
    )
    return tmp_path / "task", dict(zip(MODULES, counts, strict=True))


def test_inspect_counts_them(task: tuple[Path, dict[str, int]], capsys: pytest.CaptureFixture[str]) -> None:
    folder, counts = task
    facts = inspect_path(folder)
    assert facts["own_directions"] == counts
    assert facts["own_parameters"] == sum(counts.values()) * (32 + 32)
    cores = 4 if facts["coefficients"] == "none" else 4 * 16
    assert facts["parameters"] == cores + facts["own_parameters"]
    assert main(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["own_directions"] == counts
    assert main(["inspect", str(folder)]) == 0
    words, said = said_of_directions(counts), capsys.readouterr().out
    assert re.search(rf"^own_directions +{words}$", said, re.MULTILINE)
    assert f"own_directions: {words}" in repr(facts)


def test_the_norms_are_those_of_the_whole_update(task: tuple[Path, dict[str, int]]) -> None:
    folder, _ = task
    read, norms = read_task(folder), inspect_path(folder)["update_norms"]
    for name, core in read.cores.items():
        module = read.modules[name]
        whole = module.U.double() @ core @ module.V.double()
        if name in read.own:
            whole = whole + read.own[name][0].double() @ read.own[name][1].double()
        assert math.isclose(norms[name], float(torch.linalg.matrix_norm(whole)), rel_tol=1e-5, abs_tol=1e-9)


def test_a_task_is_printed_with_them(task: tuple[Path, dict[str, int]]) -> None:
    folder, counts = task
    assert (f"own directions: {said_of_directions(counts)}" in repr(read_task(folder))) == any(counts.values())


def test_the_card_of_a_saved_task_says_them(task: tuple[Path, dict[str, int]]) -> None:
    folder, counts = task
    text = (folder / "README.md").read_text()
    own = sum(counts.values()) * 64
    assert ("directions of its own" in text) == bool(own)
    if not own:
        return
    words = f"- directions of its own beside the basis: {said_of_directions(counts)}, {own:,} of the parameters"
    line = next(line for line in text.split("\n") if line.startswith("- directions of its own"))
    assert line == (words if len(set(counts.values())) == 1 else f"{words}: `{FIRST}` 3")
    assert "a learning rate of about" in text


def test_the_card_of_a_bundle_says_them(task: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    folder, counts = task
    bundle_tasks([folder], tmp_path / "bundle", progress=False)
    text = (tmp_path / "bundle" / "README.md").read_text()
    assert ("| own directions |" in text) == any(counts.values())
    assert (f"| {said_of_directions(counts)} |" in text) == any(counts.values())


def test_analyze_says_where_what_is_left_can_go(basis: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_lora(bert, basis.parent / "other", seed=5)
    for lora, said in (("lora", False), ("other", True)):
        assert main(["analyze", str(basis.parent / lora), "--basis", str(basis), "--quiet"]) == 0
        assert ("directions of its own" in capsys.readouterr().out) == said


def test_a_long_list_of_modules_is_cut_on_the_card() -> None:
    counts = {f"a.{number}": number % 3 for number in range(60)}
    text = task_card(dataclasses.replace(TASK, own=640, directions=counts)).text()
    assert "60 in 40 of 60 modules, 640 of the parameters: `a.1` 1, `a.2` 2, " in text and "and 28 more" in text
    assert "`factor` coefficients and directions of its own" in text
    assert "directions of its own" not in task_card(BARE_TASK).text()
