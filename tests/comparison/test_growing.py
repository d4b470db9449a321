"""A basis that follows the tasks: no jump and no forgetting where it grows, drift where it is re-fitted."""

from __future__ import annotations

import pytest
import torch

from benchmarks.continual import streams as module
from benchmarks.continual.growing import Append, Refit, digests, updates
from benchmarks.continual.shared_factors import Share
from benchmarks.continual.streams import Record
from benchmarks.quality.training import outputs_of
from subspace_peft.continual.metrics import ScoreMatrix

from .conftest import STREAM

RATE = 2e-2


@pytest.fixture(autouse=True)
def _in_full(monkeypatch):
    monkeypatch.setattr(module, "in_full", lambda stream: True)


def learned(learner):
    record = Record(learner)
    for name in STREAM.arriving:
        record.learn(name, tested=True)
    return record.found


@pytest.mark.parametrize("extra", [1, 2])
def test_a_growing_basis_neither_jumps_nor_forgets_where_share_does_both(data, extra):
    ours, share = learned(Append(data, STREAM, RATE, extra)), learned(Share(data, STREAM, RATE))
    # float32's rounding of the logits, which are of size 5
    assert max(step["jump"]["logits"] for step in ours["steps"]) < 5e-5
    assert min(step["jump"]["logits"] for step in share["steps"]) > 1e-3
    # bit for bit, at every step
    assert [change[:-1] for change in ours["change"]] == [[0.0] * i for i in range(3)]
    found = ScoreMatrix(STREAM.arriving, ours["R"])
    assert found.bwt() == 0 and found.forgetting() == 0
    assert [step["k"] for step in ours["steps"]] == [4 + extra, 4 + 2 * extra, 4 + 3 * extra]
    sizes = [4 * 4 * size**2 for size in (4 + extra, 4 + 2 * extra, 4 + 3 * extra)]
    assert [step["own_bytes"] for step in ours["steps"]] == sizes


def test_the_absorbed_task_is_a_plain_core_and_earlier_files_stay(data):
    learner = Append(data, STREAM, RATE, 2)
    first, second = STREAM.arriving[:2]
    learner.learn(first)
    assert any("extra_U" in key for key in digests(learner.task(first)))
    learner.absorb(first)
    kept = digests(learner.task(first))
    assert not any("extra_" in key for key in kept)
    learner.learn(second)
    learner.absorb(second)
    assert digests(learner.task(first)) == kept


@pytest.mark.parametrize("needed", [False, True])
def test_a_task_gets_directions_only_where_validation_asks_for_them(data, monkeypatch, needed):
    from benchmarks.continual import growing

    told = iter(
        [0.5, 0.4, 0.52 if needed else 0.505] * 3
    )  # validation and test of the core, validation with directions
    monkeypatch.setattr(growing, "score", lambda model, task, split: next(told))
    found = learned(Append(data, STREAM, RATE, 2, probe=True))
    assert [step["k"] for step in found["steps"]] == ([6, 8, 10] if needed else [4, 4, 4])
    assert [step["own"] for step in found["steps"]] == [needed] * 3
    assert [step["forward"]["k"] for step in found["steps"]] == ([4, 6, 8] if needed else [4, 4, 4])
    assert max(step["jump"]["logits"] for step in found["steps"]) < 5e-5


def test_a_basis_of_fixed_size_drifts_and_says_by_how_much(data):
    learner = Refit(data, STREAM, RATE, 2)
    found = learned(learner)
    assert [step["k"] for step in found["steps"]] == [4, 4, 4]
    drift = found["steps"][-1]["drift"]
    assert set(drift) == set(STREAM.arriving) and all(0 < each < 1 for each in drift.values())
    # as the products themselves say
    name = STREAM.arriving[0]
    before, now = (
        {key: sum(B.double() @ A.double() for B, A in each) for key, each in found.items()}
        for found in (learner.trained[name], updates(learner.task(name)))
    )
    lost = sum(float((before[key] - now[key]).square().sum()) for key in before) ** 0.5
    assert drift[name] == pytest.approx(lost / sum(float(each.square().sum()) for each in before.values()) ** 0.5)
    split = data.task(name).splits["test"]
    assert torch.isfinite(outputs_of(learner.model(name), split)).all()
