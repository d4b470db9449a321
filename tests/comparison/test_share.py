"""Share's rule: what its re-fitting keeps, and the jump that comes of dropping what a task had learned."""

from __future__ import annotations

import pytest
import torch

from benchmarks.continual.share import SharedFactors, absorbed, distance, first_bases, leading
from benchmarks.continual.shared_factors import Share, ShareKeep
from benchmarks.continual.streams import Record
from benchmarks.quality.training import outputs_of

from .conftest import STREAM

OUT, IN, R, K = 12, 10, 3, 5


def pair(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(size, R, generator=draw, dtype=torch.float64) for size in (OUT, IN))


@pytest.fixture
def shared() -> SharedFactors:
    return first_bases({"a": pair(1), "b": pair(2)}, K)


def test_the_bases_are_the_leading_ones_of_the_centred_stack(shared):
    stack = torch.cat([pair(1)[0], pair(2)[0]], 1)
    U = torch.linalg.svd(stack - stack.mean(1, keepdim=True))[0][:, :K]
    assert torch.allclose(shared.out @ shared.out.T, U @ U.T)
    assert torch.allclose(shared.inner.T @ shared.inner, torch.eye(K, dtype=torch.float64))
    assert torch.allclose(shared.factors("a")[0], shared.out @ shared.out.T @ pair(1)[0])


@pytest.mark.parametrize("keep", [False, True])
def test_a_task_that_fits_loses_nothing_and_an_update_is_dropped_or_kept(keep):
    # as many directions as all of it needs, so that nothing but the rule can lose anything
    shared = first_bases({"a": pair(1)}, 8)
    loadings = tuple(torch.randn(8, R, dtype=torch.float64) for _ in range(2))
    nothing = tuple(torch.zeros(size, R, dtype=torch.float64) for size in (OUT, IN))
    learned = (shared.out @ loadings[0], shared.inner @ loadings[1])
    quiet = absorbed(shared, "new", loadings, nothing, keep=keep)
    assert distance(learned, quiet.factors("new"))[0] < 1e-9 * distance(learned, learned)[1]
    update = pair(3)
    with_update = absorbed(shared, "new", loadings, update, keep=keep)
    left = (learned[0] + update[0], learned[1] + update[1])
    lost, whole = distance(left, with_update.factors("new"))
    assert (lost < 0.7 * whole) == keep


def test_old_tasks_drift_where_the_bases_are_too_small(shared):
    before = shared.factors("a")
    after = absorbed(shared, "c", tuple(torch.randn(K, R, dtype=torch.float64) for _ in range(2)), pair(4), keep=True)
    lost, whole = distance(before, after.factors("a"))
    assert 1e-3 * whole < lost < whole and after.out.shape == shared.out.shape


def test_distance_is_that_of_the_products():
    one, other = pair(5), pair(6)
    lost, whole = distance(one, other)
    assert lost == pytest.approx(float((one[0] @ one[1].T - other[0] @ other[1].T).norm()))
    assert whole == pytest.approx(float((one[0] @ one[1].T).norm()))
    assert leading(one[0], 2).shape == (OUT, 2)


@pytest.mark.parametrize("kind", [Share, ShareKeep])
def test_learning_begins_at_no_effect_and_ends_as_its_factors_say(data, kind):
    learner = kind(data, STREAM, 2e-2)
    first = STREAM.arriving[0]
    split = data.task(first).splits["test"]
    untouched = outputs_of(learner.untrained(first), split)
    still = kind(data, STREAM, 0.0)
    model, _ = still.learn(first)
    model.classifier.load_state_dict(learner.untrained(first).classifier.state_dict())
    assert torch.allclose(outputs_of(model, split), untouched, atol=1e-5)
    model, facts = learner.learn(first)
    trained = outputs_of(model, split)
    # the parameters that the temporary update has beside the loadings
    assert facts["trained"] == 4 * 2 * (4 * 8 + 16 * 2 + 2 * 8)
    for module in learner.learning.values():
        left, right = (side.detach() for side in module.update())
        assert left.norm() > 0 and right.norm() > 0
    learner.absorb(first)
    exact = {
        module: type(shared)(*(torch.eye(16, dtype=torch.float64),) * 2, {first: learner.trained[first][module]})
        for module, shared in learner.shared.items()
    }
    learner.shared = exact
    assert torch.allclose(outputs_of(learner.model(first), split), trained, atol=1e-4)


def test_share_jumps_when_a_task_is_stored(data):
    record = Record(Share(data, STREAM, 2e-2))
    for name in STREAM.arriving:
        record.learn(name, tested=True)
    assert all(step["jump"]["logits"] > 1e-3 for step in record.found["steps"])
    drifts = record.found["steps"][-1]["drift"]
    assert set(drifts) == set(STREAM.arriving) and all(0 < each < 1.5 for each in drifts.values())
