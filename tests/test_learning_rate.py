"""What is said of an optimiser's rate for coefficients: a table of rates, kinds and loops, and real Trainer runs."""

from __future__ import annotations

import copy
import gc
import math
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from subspace_peft import SubspaceConfig
from subspace_peft.tuner import learning_rate

from .models import bert

QUIET, LOW, HIGH = "", "below the range", "above the range"


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning_rate, "_said", set())


def model_of(**config: Any) -> nn.Module:
    model = bert()
    config = {"basis": "random", "k": 4, "target_modules": ["query"], "task_type": "SEQ_CLS", **config}
    return get_peft_model(model, SubspaceConfig(**config))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def coefficients(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "subspace_coef" in name]


def said(steps: Callable[[], Any]) -> list[str]:
    """Run `steps` and return what was said of rates."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps()
    return [str(one.message) for one in caught if "subspace coefficients at a learning rate" in str(one.message)]


def loop(optimizer: torch.optim.Optimizer, schedule: Any = None, steps: int = 3) -> None:
    for _ in range(steps):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        if schedule is not None:
            schedule.step()


RATES = [
    *((rate, 256.0, LOW) for rate in (1e-6, 5e-5, 9.9e-5)),
    *((rate, 256.0, QUIET) for rate in (1e-4, 3e-4, 3e-3, 1.92e-2, 2e-2)),
    *((rate, 256.0, HIGH) for rate in (2.1e-2, 0.4)),
    # a step moves ΔW by alpha · rate
    (5e-5, 2560.0, QUIET),
    (3e-3, 2560.0, HIGH),
    (3e-3, 2.56, LOW),
    (0.3, 2.56, QUIET),
]


@pytest.mark.parametrize(("rate", "alpha", "expected"), RATES)
def test_rates(rate, alpha, expected):
    model = model_of(alpha=alpha)
    found = said(lambda: loop(torch.optim.AdamW(trained(model), lr=rate)))
    assert len(found) == bool(expected)
    if expected:
        assert expected in found[0] and f"rate of {rate:g}," in found[0] and f"at alpha={alpha:g}" in found[0]
        assert f"{1e-4 * 256 / alpha:g} to {2e-2 * 256 / alpha:g}" in found[0]
        assert f"TrainingArguments(learning_rate={3e-3 * 256 / alpha:g})" in found[0]


@pytest.mark.parametrize("kind", ["core", "factor", "diagonal", "directions"])
@pytest.mark.parametrize(("rate", "expected"), [(5e-5, LOW), (3e-3, QUIET), (0.1, HIGH)])
def test_kinds(kind, rate, expected):
    model = model_of(coefficients=kind)
    found = said(lambda: loop(torch.optim.AdamW(trained(model), lr=rate)))
    assert len(found) == bool(expected) and all(expected in one for one in found)


@pytest.mark.parametrize("rate", [3e-3, 0.4, 2.0])
@pytest.mark.parametrize("kind", ["none", "core"])
def test_gains_have_a_range_of_their_own_where_they_are_all_that_is_trained(bases, kind, rate):
    config = SubspaceConfig(basis=bases[bert], coefficients=kind, mean_gain="trainable", task_type="SEQ_CLS")
    model = get_peft_model(bert(), config)
    found = said(lambda: loop(torch.optim.AdamW(trained(model), lr=rate)))
    want = {"none": {3e-3: LOW, 0.4: QUIET, 2.0: HIGH}, "core": {3e-3: QUIET, 0.4: HIGH, 2.0: HIGH}}[kind][rate]
    assert len(found) == bool(want) and all(want in one for one in found)
    assert all(("0.025 to 1.6:" in one) == (kind == "none") for one in found)


def warmed(parameters: list[nn.Parameter], peak: float) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(parameters, lr=peak)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 100))


def one_cycle(parameters: list[nn.Parameter], peak: float) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-9)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peak, total_steps=100)


def decaying(parameters: list[nn.Parameter], peak: float) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(parameters, lr=peak)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)


@pytest.mark.parametrize("make", [warmed, one_cycle, decaying])
@pytest.mark.parametrize(("peak", "expected"), [(5e-5, LOW), (3e-3, QUIET), (0.1, HIGH)])
def test_schedules_are_judged_by_their_peak(make, peak, expected):
    model = model_of()
    found = said(lambda: loop(*make(trained(model), peak), steps=30))
    assert len(found) == bool(expected) and all(expected in one for one in found)
    # a high one is named as it is when it gets there
    assert expected != LOW or f"rate of {peak:g}," in found[0]


def of_its_own(parameters: list[nn.Parameter], peak: float) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(parameters, lr=1.0)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: peak * min(1.0, step / 10))


def multiplied(parameters: list[nn.Parameter], peak: float) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: peak * 1e6 * min(1.0, step / 10))


def cyclic(parameters: list[nn.Parameter], peak: float) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-9)
    return optimizer, torch.optim.lr_scheduler.CyclicLR(optimizer, 1e-9, peak, step_size_up=10, cycle_momentum=False)


@pytest.mark.parametrize(
    ("make", "peak", "expected"),
    [
        (of_its_own, 3e-3, QUIET),
        (of_its_own, 0.1, HIGH),
        (multiplied, 3e-3, QUIET),
        (cyclic, 3e-3, QUIET),
        (cyclic, 5e-5, LOW),
    ],
)
def test_schedules_that_leave_the_rate_they_note_are_judged_by_what_they_reach(make, peak, expected):
    model = model_of()
    optimizer, schedule = make(trained(model), peak)
    # nothing is said of a rate that no step is taken with, nor of one that goes on to rise
    assert said(lambda: loop(optimizer, schedule, steps=2)) == []
    found = said(lambda: loop(optimizer, schedule, steps=20))
    assert len(found) == bool(expected) and all(expected in one for one in found)


@pytest.mark.parametrize("rate", [1e-4, 2e-2])
@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize("r", [1, 2, 3])
def test_the_ends_of_the_range_are_within_it(rate, kind, r):
    # s · √n is not 256 to the last bit for all n, nor is a rate of 32 bits
    model = model_of(coefficients="factor", k=5, r=r)
    assert said(lambda: loop(torch.optim.AdamW(trained(model), lr=kind(rate)))) == []


def test_a_rate_that_fell_by_hand_is_not_judged_again_when_models_or_groups_come():
    model = model_of()
    optimizer = torch.optim.AdamW(trained(model), lr=3e-3)
    others = []

    def steps() -> None:
        loop(optimizer)
        optimizer.param_groups[0]["lr"] = 1e-6
        others.append(model_of())
        loop(optimizer)
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 1e-6})
        loop(optimizer)

    assert said(steps) == []
    optimizer.param_groups.pop()
    optimizer.add_param_group({"params": trained(others[0]), "lr": 1e-6})
    assert len(said(lambda: loop(optimizer))) == 1


def test_what_is_unfrozen_later_is_judged_then():
    model = model_of()
    optimizer = torch.optim.AdamW(trained(model), lr=5e-5)
    for parameter in coefficients(model):
        parameter.requires_grad_(False)
    assert said(lambda: loop(optimizer)) == []
    for parameter in coefficients(model):
        parameter.requires_grad_(True)
    assert len(said(lambda: loop(optimizer))) == 1


def test_where_warnings_are_errors_training_can_go_on():
    model = model_of()
    optimizer = torch.optim.AdamW(trained(model), lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="above the range"):
            loop(optimizer)
        loop(optimizer)


def test_nothing_is_read_while_a_graph_is_captured(monkeypatch):
    model = model_of()
    optimizer = torch.optim.AdamW(trained(model), lr=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        patch.setattr(learning_rate, "_rate_of", lambda group: pytest.fail("the rate was read"))
        learning_rate._before_step(optimizer, (), {})
    assert len(said(lambda: loop(optimizer))) == 1


@pytest.mark.parametrize(("rates", "expected"), [([1e-6, 1e-5, 1e-3, 3e-3], QUIET), ([1e-6, 1e-5, 5e-5, 5e-5], LOW)])
def test_a_rate_raised_by_hand_is_judged_where_it_stops(rates, expected):
    model = model_of()
    optimizer = torch.optim.AdamW(trained(model), lr=0.0)

    def steps() -> None:
        for rate in rates:
            optimizer.param_groups[0]["lr"] = rate
            loop(optimizer, steps=1)

    found = said(steps)
    assert len(found) == bool(expected) and all("rate of 5e-05," in one for one in found)


def test_groups_without_coefficients_do_not_count():
    model = model_of()
    own = {id(p) for p in coefficients(model)}
    head = [p for p in trained(model) if id(p) not in own]

    def groups(of_coefficients: float, of_head: float) -> Any:
        return [{"params": coefficients(model), "lr": of_coefficients}, {"params": head, "lr": of_head}]

    assert said(lambda: loop(torch.optim.AdamW(groups(3e-3, 5e-5)))) == []
    assert said(lambda: loop(torch.optim.AdamW(head, lr=1e-6))) == []
    (one,) = said(lambda: loop(torch.optim.AdamW(groups(5e-5, 3e-3))))
    assert "rate of 5e-05," in one


def test_what_is_frozen_does_not_count():
    model = model_of()
    optimizer = torch.optim.AdamW([*coefficients(model), nn.Parameter(torch.zeros(1))], lr=5e-5)
    for parameter in coefficients(model):
        parameter.requires_grad_(False)
    assert said(lambda: loop(optimizer)) == []


class Adam8bit(torch.optim.Adam):
    """Called as bitsandbytes's, which are made like this one."""


class Prodigy(torch.optim.SGD):
    """One whose rate of 1 is a factor."""


class DAdaptAdam(torch.optim.SGD):
    """Another."""


OPTIMIZERS = {
    torch.optim.Adam: True,
    torch.optim.AdamW: True,
    torch.optim.NAdam: True,
    torch.optim.RAdam: True,
    torch.optim.Adamax: True,
    Adam8bit: True,
    torch.optim.SGD: False,
    torch.optim.Adagrad: False,
    Prodigy: False,
    DAdaptAdam: False,
}


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_only_optimisers_like_adam_have_a_known_range(kind):
    model = model_of()
    found = said(lambda: loop(kind(trained(model), lr=5e-5)))
    assert len(found) == OPTIMIZERS[kind] and all(one.startswith(kind.__name__ + " trains") for one in found)


def test_it_is_said_once_and_again_of_another_rate():
    model = model_of()
    assert len(said(lambda: [loop(torch.optim.AdamW(trained(model), lr=5e-5)) for _ in range(3)])) == 1
    other = model_of()
    assert said(lambda: loop(torch.optim.AdamW(trained(other), lr=5e-5))) == []
    assert len(said(lambda: loop(torch.optim.AdamW(trained(model), lr=6e-5)))) == 1


def test_the_users_own_line_is_named():
    model = model_of()
    optimizer = torch.optim.AdamW(trained(model), lr=1.0)
    with pytest.warns(UserWarning, match="above the range") as caught:
        loop(optimizer)
    assert [one.filename for one in caught] == [__file__]


def test_copies_and_groups_that_come_later_are_seen():
    model = copy.deepcopy(model_of())
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=5e-5)
    assert said(lambda: loop(optimizer)) == []
    optimizer.add_param_group({"params": coefficients(model)})
    assert len(said(lambda: loop(optimizer))) == 1


def test_tensors_that_fsdp_makes_of_several_count():
    model = model_of()
    flat = nn.Parameter(torch.zeros(8))

    class Info:
        param_name = "weight"
        module = next(layer for layer in model.modules() if isinstance(layer, learning_rate.Coefficients))

    flat._param_infos = [Info]
    assert len(said(lambda: loop(torch.optim.AdamW([flat], lr=5e-5)))) == 1


def test_nothing_is_held_and_a_step_costs_nothing():
    model = model_of()
    optimizer = torch.optim.AdamW(trained(model), lr=3e-3)
    loop(optimizer)
    began = time.process_time()
    for _ in range(1000):
        learning_rate._before_step(optimizer, (), {})
    assert time.process_time() - began < 0.05  # 50 µs each would be noticed nowhere; it is about one
    places = [weakref.ref(model), weakref.ref(optimizer)]
    del model, optimizer
    gc.collect()
    assert [place() for place in places] == [None, None]


def test_an_optimiser_that_is_never_judged_is_not_held_by_its_parameters():
    model = model_of()
    optimizer = torch.optim.AdamW(trained(model), lr=5e-5)
    for parameter in coefficients(model):
        # as where each gradient is used as soon as it is there
        parameter.use = optimizer.step
        parameter.requires_grad_(False)
    loop(optimizer)
    assert learning_rate._looks[optimizer].left
    place = weakref.ref(optimizer)
    del model, optimizer, parameter
    gc.collect()
    assert place() is None


def test_accelerates_optimisers_are_seen():
    from accelerate import Accelerator

    model, optimizer = Accelerator(cpu=True).prepare((model := model_of()), torch.optim.AdamW(trained(model), lr=5e-5))
    assert len(said(lambda: loop(optimizer))) == 1


@pytest.mark.parametrize(("given", "expected"), [({}, LOW), ({"learning_rate": 3e-3, "warmup_steps": 2}, QUIET)])
def test_the_stock_trainer(tmp_path, given, expected):
    rows = [{"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor(i % 2)} for i in range(8)]
    settings = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **given,
    )
    model = model_of()
    found = said(lambda: Trainer(model, settings, train_dataset=rows).train())
    assert len(found) == bool(expected) and all("rate of 5e-05," in one and "0.003" in one for one in found)
    # the range is what a step of this size means
    layer = next(layer for layer in model.modules() if isinstance(layer, learning_rate.Coefficients))
    assert learning_rate._watched[layer] == pytest.approx(256.0) and layer.steps == 16 == math.prod(layer.weight.shape)
