"""What a report draws and says beside its page: curves over k, labels of charts, the command that makes it again."""

from __future__ import annotations

import itertools

import pytest
import torch

from subspace_peft.builders.left_out import left_out_energy
from subspace_peft.report import curves
from subspace_peft.report.chart import APART, Line, chart
from subspace_peft.report.commands import making_command
from subspace_peft.report.measure import measure
from subspace_peft.sources.factors import Factors

from .test_report import related
from .test_report_page import fleet
from .test_streaming import saved_fleet


def factors(states):
    return [Factors(state["a.q.lora_B.weight"], state["a.q.lora_A.weight"]) for state in states]


def test_curves_are_what_builds_of_every_k_keep(monkeypatch):
    states = related(n=5, noise=1.0)
    updates, counts, folds = factors(states), [1.0, 1.0, 0.5, 0.5, 1.0], [0, 1, 2, 2, 3]
    found = measure(updates, counts, folds, [1.0] * 5, (3, 3), 0, alternations=10)[1]
    assert found.spans == (10, 10) and found.alternated == list(range(1, 10))
    weights = [count**0.5 / update.norm() for count, update in zip(counts, updates, strict=True)]
    for k in (1, 2, 5, 9, 10):
        left_out = left_out_energy(updates, weights, folds, (k, k), 10)
        assert found.left_out[:, k - 1].tolist() == pytest.approx(left_out, abs=1e-6)
    assert found.seen[:, -1].tolist() == pytest.approx([1.0] * 5)
    assert bool((found.seen >= found.plain - 0.2).all()) and float((found.seen - found.plain).mean()) > 1e-4
    # with less work the gains between are linear, and near
    rough = measure(updates, counts, folds, [1.0] * 5, (3, 3), 0, alternations=10, work=1)[1]
    assert rough.alternated == [1, 3] and torch.allclose(rough.seen[:, 2], found.seen[:, 2])
    off, off_without = ((each - found.seen).mean(0).abs() for each in (rough.seen, found.plain))
    assert float(off.mean()) < float(off_without.mean()) / 2 and float(off.max()) < 0.05
    # without alternations there are none to add
    plain = measure(updates, counts, folds, [1.0] * 5, (3, 3), 0)[1]
    assert plain.alternated == [] and torch.equal(plain.seen, plain.plain)
    monkeypatch.setattr(curves, "MOST", 4)
    assert measure(updates, counts, folds, [1.0] * 5, (3, 3), 0)[1].seen.shape == (5, 4)


@pytest.mark.parametrize("last", [2, 3, 9, 17, 33, 64, 100, 128])
def test_labels_under_a_chart_do_not_run_into_one_another(last):
    for log in (True, False):
        xs = range(1, last + 1)
        made = chart("t", "k", "kept", xs, [Line("a", "fleet", [1 / x for x in xs])], log_x=log, log_y=not log)
        places = [place for place, _ in made.x_ticks]
        assert all(after - before >= APART for before, after in itertools.pairwise(places))
        assert made.x_ticks[0][1] == "1" and made.x_ticks[-1][1] == str(last)
        numbers = [float(number) for point in made.lines[0]["points"].split() for number in point.split(",")]
        assert all(0 <= number <= made.width for number in numbers)


def test_the_command_that_makes_a_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = saved_fleet(tmp_path / "loras", fleet(3))
    absolute = making_command(tmp_path / "my basis", folders, {"sample": 9, "allow_bin": True})
    assert absolute == "subspace-peft report 'my basis' --fleet loras/* --sample 9 --allow-bin"
    assert making_command("org/basis", None, {}) == "subspace-peft report org/basis"
    two = making_command("b", folders[:2], {})
    assert two == "subspace-peft report b --fleet loras/lora-0 loras/lora-1"
    assert making_command("b", [{}], {"seed": 3}) == "report_basis('b', sources, seed=3)"
    # a place elsewhere is named by its last part
    assert "/" not in making_command("/somewhere/else/basis", None, {}).removeprefix("subspace-peft report ")
