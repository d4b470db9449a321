"""Streams of tasks: what is kept, what is tested, which rate is taken; and the methods that have no basis."""

from __future__ import annotations

import pytest
import torch

from benchmarks.continual import streams as module
from benchmarks.continual.in_basis import FrozenBasis, RandomBasis
from benchmarks.continual.learner import HeadOnly, LoraEach, Osf, SequentialLora
from benchmarks.continual.setting import FIRST, ORDERS, Stream
from benchmarks.continual.shared_factors import Share
from benchmarks.continual.streams import Method, Record, Streams, every_stream, sweep_rates
from benchmarks.quality.bench import OutOfTime
from benchmarks.quality.training import outputs_of

from .conftest import STREAM

APART = [HeadOnly, LoraEach, FrozenBasis, RandomBasis]


def learned(learner, names=STREAM.arriving):
    record = Record(learner)
    for name in names:
        record.learn(name, tested=True)
    return record.found


def made(kind, data, rate=1e-2):
    return kind(data, STREAM, rate, 4) if kind is RandomBasis else kind(data, STREAM, rate)


def test_every_task_arrives_in_two_orders_and_is_given_in_the_third():
    for task in ORDERS["A"]:
        assert sum(task in order[:FIRST] for order in ORDERS.values()) == 1
    assert all(sorted(order) == sorted(ORDERS["A"]) for order in ORDERS.values())
    assert [(name, each.seed) for name, each in every_stream("AB", (1, 2))] == [("A", 1), ("B", 1), ("A", 2), ("B", 2)]


@pytest.mark.parametrize("kind", APART, ids=lambda kind: kind.__name__)
def test_a_task_that_is_kept_apart_is_what_it_is_alone(data, kind):
    found = learned(made(kind, data))
    assert [len(row) for row in found["R"]] == [1, 2, 3]
    assert [row[0] for row in found["R"][1:]] == [None, found["R"][0][0]]
    assert found["change"][-1] == [0.0] * 3 and all(step["jump"]["logits"] == 0 for step in found["steps"])
    alone = learned(kind(data, Stream(STREAM.given, STREAM.arriving[2:], 1), 1e-2), STREAM.arriving[2:])
    if kind is not RandomBasis:
        assert alone["R"][0][0] == found["R"][-1][-1]


@pytest.mark.parametrize("kind", [SequentialLora, Osf, Share], ids=lambda kind: kind.__name__)
def test_where_weights_are_shared_later_tasks_change_earlier_ones(data, kind):
    found = learned(made(kind, data, 3e-2))
    assert all(change > 1e-4 for change in found["change"][-1][:-1])


def test_all_earlier_tasks_are_tested_in_one_stream(data, monkeypatch):
    monkeypatch.setattr(module, "in_full", lambda stream: True)
    found = learned(made(SequentialLora, data))
    assert None not in [score for row in found["R"] for score in row]


@pytest.mark.parametrize("kind", [SequentialLora, Osf])
def test_the_shared_weights_hold_what_was_trained(data, kind):
    learner = made(kind, data, 3e-2)
    for name in STREAM.arriving[:2]:
        model, facts = learner.learn(name)
        split = data.task(name).splits["test"]
        assert torch.allclose(outputs_of(learner.model(name), split), outputs_of(model, split), atol=1e-4)
        untouched = outputs_of(learner.with_head(name), split)
        assert (outputs_of(model, split) - untouched).abs().max() > 1e-2
    assert facts["trained"] > 0 and learner.stored(name) == (
        0,
        {SequentialLora: 4 * 2 * 8 * 16, Osf: 4 * 16 * 16}[kind],
    )


def test_osf_preserves_a_growing_part_of_each_weight(data):
    learner = made(Osf, data)
    assert [learner.config(name).effective_rank for name in STREAM.arriving] == [1, 16 // 3, 2 * 16 // 3]
    trained = []
    for name in STREAM.arriving:
        trained.append(learner.learn(name)[1]["trained"])
    assert trained == [4 * (2 * 16 * (16 - rank) + 16 - rank) for rank in (1, 5, 10)]


def test_finished_streams_are_never_run_twice(data, tmp_path, monkeypatch):
    listed = [Method("LoRA", LoraEach, LoraEach), Method("one LoRA", SequentialLora, SequentialLora)]
    streams = Streams(data, tmp_path / "runs")
    first = [streams.result(method, STREAM, 1e-2) for method in listed]
    turned = Stream(STREAM.given, STREAM.arriving[::-1], STREAM.seed)
    with monkeypatch.context() as patch:
        patch.setattr(streams, "run", lambda *_, **__: pytest.fail("run again"))
        assert [streams.result(method, STREAM, 1e-2) for method in listed] == first
        # where tasks are kept apart another order is known as well
        assert streams.result(listed[0], turned, 1e-2)["R"][-1] == first[0]["R"][-1][::-1]
    late = Streams(data, tmp_path / "runs", until=0.0)
    with pytest.raises(OutOfTime):
        late.result(listed[1], turned, 1e-2)


def test_a_method_takes_the_rate_that_is_best_at_the_end_of_its_sweep(data, tmp_path, monkeypatch):
    monkeypatch.setattr(module.Stream, "of_order", classmethod(lambda cls, name, seed: STREAM))
    streams = Streams(data, tmp_path)
    asked = []

    def result(method, stream, rate, *, sweep):
        asked.append((rate, stream.arriving, sweep))
        return {"validation": [None, 1 - abs(rate - 1.6e-3)]}

    monkeypatch.setattr(streams, "result", result)
    assert streams.rate(Method("LoRA", LoraEach, LoraEach))[0] == 1.6e-3
    assert [rate for rate, _, _ in asked] == list(LoraEach.rates) and all(sweep for _, _, sweep in asked)


def test_a_best_rate_at_the_edge_widens_the_sweep_at_most_twice():
    assert sweep_rates((1, 4, 16), lambda rate: -rate) == (
        1 / 16,
        {1: -1, 4: -4, 16: -16, 0.25: -0.25, 1 / 16: -1 / 16},
    )
    assert sweep_rates((1, 4, 16), lambda rate: -abs(rate - 64))[0] == 64
    assert sweep_rates((1, 4, 16), lambda rate: 0.0)[0] == 1 / 16


def test_a_jump_is_measured_in_float32_too_and_the_model_stays_as_it_was(data, monkeypatch):
    monkeypatch.setattr("benchmarks.quality.training.half_is_faster", lambda: True)
    name, split = STREAM.arriving[0], data.task(STREAM.arriving[0]).splits["test"]
    model = data.model(name, 1)
    half = outputs_of(model, split)
    exact = module.in_float32(model, split)
    assert 1e-4 < (exact - half).abs().max() < 0.1 and torch.equal(outputs_of(model, split), half)
    found = learned(made(SequentialLora, data), STREAM.arriving[:1])
    assert found["steps"][0]["jump"]["float32"] == 0
