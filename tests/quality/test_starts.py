"""First gradients, ridge regressions, and starts of a core."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import get_peft_model

from benchmarks.quality.encoder import Top
from benchmarks.quality.rows import inside
from benchmarks.quality.training import make_model, outputs_of

from .conftest import SMALL, D, orthonormal, top_of, toy


def test_the_nearest_source_is_one_of_the_basiss(bench, monkeypatch):
    from benchmarks.quality import starts

    monkeypatch.setattr(starts, "FIT", 20)
    monkeypatch.setattr(starts, "HELD", 12)
    basis = bench.basis("one", k=4)
    losses = []
    original = starts.ridge_loss
    monkeypatch.setattr(starts, "ridge_loss", lambda *given: losses.append(original(*given)) or losses[-1])
    chosen = starts.nearest_source(bench, "one", basis)
    names = [each["name"] for each in basis.info["sources"]]
    assert len(losses) == 2 and losses[0] != losses[1] and chosen == names[losses.index(min(losses))]


def test_first_gradients_are_those_of_the_loss_and_leave_the_model_alone():
    from benchmarks.quality.gradients import first_gradients
    from benchmarks.quality.ridge import ridge, targets

    task = toy("one")
    some, model = task.splits["train"], make_model(top_of(), 2, 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    found = first_gradients(model, some)
    assert sorted(found) == [f"layer.{i}.{name}" for i in (0, 1) for name in ("query", "value")]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == wanted and all(p.grad is None for p in model.parameters())
    # a finite difference along the gradient, in a model without bfloat16
    plain, y = Top(**top_of(), outputs=2, seed=0), targets(some.labels, 2)
    weight, bias = ridge(outputs_of(model.features, some), some.labels, 2)

    def loss():
        with torch.no_grad():
            features = plain.features(some.hidden, some.lengths).double()
            return float((features @ weight.T.double() + bias - y).square().mean())

    layer, g = plain.get_submodule("layer.1.value"), found["layer.1.value"]
    step, at = 0.01 * g / g.norm(), layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.copy_(at + step)
        up = loss()
        layer.weight.copy_(at - step)
    assert (up - loss()) / 0.02 == pytest.approx(float(g.norm()), rel=0.05)


def test_a_ridge_regression_is_scikit_learns():
    from sklearn.linear_model import Ridge

    from benchmarks.quality.ridge import ridge

    torch.manual_seed(0)
    x, y = torch.randn(40, 5), torch.randint(0, 3, (40,))
    weight, bias = ridge(x, y, 3, 2.0)
    theirs = Ridge(alpha=2.0).fit(x.numpy(), np.eye(3)[y.numpy()])
    assert np.allclose(weight, theirs.coef_, atol=1e-5) and np.allclose(bias, theirs.intercept_, atol=1e-5)


def test_a_gradients_basis_spans_its_leading_directions(bench):
    from benchmarks.quality.gradients import gradient_basis

    fleet = bench.basis("one", k=2)
    torch.manual_seed(0)
    rank_two = {name: torch.randn(D, 2) @ torch.randn(2, D) for name in fleet}
    made = gradient_basis(fleet, [rank_two])
    for name, module in made.items():
        kept = module.U @ (module.U.T @ rank_two[name] @ module.V.T) @ module.V
        assert torch.allclose(kept, rank_two[name], atol=1e-4) and orthonormal(module.U) and orthonormal(module.V.T)
    # a gradient twice as large has no more say
    other = {name: torch.randn(D, D) for name in fleet}
    twice = gradient_basis(fleet, [other, {name: 2 * value for name, value in rank_two.items()}])
    once = gradient_basis(fleet, [other, rank_two])
    assert all(torch.allclose(once[name].U.abs(), twice[name].U.abs(), atol=1e-5) for name in fleet)


def test_a_convex_mix_finds_the_source_that_solves_the_task(bench):
    from benchmarks.quality.starts import convex_mix, mix_cores, starting_at_mix

    basis = bench.basis("one", k=4)
    mix = convex_mix(bench, "one", basis, SMALL, 1)
    assert mix.shape == (3,) and float(mix.sum()) == pytest.approx(1.0) and float(mix.min()) >= 0
    assert torch.equal(mix, convex_mix(bench, "one", basis, SMALL, 1))
    assert not torch.equal(mix, convex_mix(bench, "one", basis, SMALL, 2))
    first = torch.tensor([1.0, 0.0, 0.0])
    for module in starting_at_mix(basis, first).values():
        assert torch.equal(module.M, module.cores[0])
    for name, module in basis.items():
        assert torch.allclose(mix_cores(basis, mix)[name], mix[0] * module.cores[0] + mix[1] * module.cores[1])
    # the model that starts there has the mix's update
    row = inside("mix", starting_at_mix(basis, first), start="mean")
    mixed = get_peft_model(make_model(top_of(), 2, 0), row.adapter())
    named = inside("first", basis, start=basis.info["sources"][0]["name"])
    alone = get_peft_model(make_model(top_of(), 2, 0), named.adapter())
    some = toy("one").splits["test"]
    assert torch.allclose(outputs_of(mixed, some), outputs_of(alone, some), atol=1e-5)


def test_a_mix_needs_cores(bench):
    from benchmarks.quality.starts import mix_cores

    with pytest.raises(ValueError, match="no cores to mix"):
        mix_cores(bench.control("random", "one", 4), torch.ones(1))
