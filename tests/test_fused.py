"""The fused steps against the plain chain: outputs and gradients, and who gets which path."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn

from subspace_peft import SubspaceConfig
from subspace_peft.tuner import layer_kinds as kinds
from subspace_peft.tuner.fused import Terms, add_update, linear_with_update


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    given = {"basis": "random", "k": 3, "target_modules": ["first", "second"], "init_weights": False, **config}
    return get_peft_model(Two().to(dtype), SubspaceConfig(**given))


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the ways each layer's call took, from here on."""
    taken: list[str] = []

    def noting(name: str, function: Any) -> Any:
        return lambda *given: (taken.append(name), function(*given))[1]

    monkeypatch.setattr(kinds, "linear_with_update", noting("with base", linear_with_update))
    monkeypatch.setattr(kinds, "add_update", noting("in place", add_update))
    return taken


def operands(dtype: torch.dtype, bias: bool, rows: tuple[int, ...] = (2, 3), own: int = 0) -> tuple[Any, ...]:
    """Return x, W, b and the update's terms, with `own` directions of the task's own."""
    draw = torch.Generator().manual_seed(1)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=dtype)

    x, C = make(*rows, 6).requires_grad_(), make(2, 3).requires_grad_()
    more = (make(5, own).requires_grad_(), make(own, 6).requires_grad_(), 0.3) if own else ()
    return x, make(5, 6), make(5) if bias else None, Terms(make(5, 2), C, make(3, 6), 0.7, *more)


def chain(x: Any, W: Any, b: Any, terms: Terms) -> torch.Tensor:
    result = F.linear(x, W, b) + terms.scale * F.linear(F.linear(F.linear(x, terms.V), terms.C), terms.U)
    return result if terms.v is None else result + terms.own * F.linear(F.linear(x, terms.v), terms.u)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(7,), (2, 3), (2, 1, 3), (0,)], ids=str)
@pytest.mark.parametrize("fused", ["with base", "in place"])
@pytest.mark.parametrize("own", [0, 1, 2])
def test_outputs_and_gradients_are_the_plain_chains(fused, rows, bias, own):
    x, W, b, terms = operands(torch.float64, bias, rows, own)
    one = linear_with_update(x, W, b, terms) if fused == "with base" else None
    one = add_update(F.linear(x, W, b), x, terms) if one is None else one
    other = chain(x, W, b, terms)
    torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(add_update(F.linear(x, W, b), x, terms), other)
    seed = torch.randn(other.shape, dtype=torch.float64)
    mine, wanted = (torch.autograd.grad((out * seed).sum(), (x, *terms.trained)) for out in (one, other))
    torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("own", [0, 2])
def test_numerical_gradients_and_second_derivatives_are_refused(own):
    x, W, b, terms = operands(torch.float64, True, own=own)

    def run(x: torch.Tensor, C: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        return linear_with_update(x, W, b, terms._replace(C=C, **dict(zip("uv", more, strict=False))))

    assert torch.autograd.gradcheck(run, (x, *terms.trained))
    for out in (run(x, *terms.trained), add_update(F.linear(x, W, b), x, terms)):
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_only_what_needs_a_gradient_gets_one():
    x, W, b, terms = operands(torch.float32, True, own=1)
    linear_with_update(x.detach(), W, b, terms).sum().backward()
    assert all(each.grad is not None for each in terms.trained) and x.grad is None
    held = terms._replace(C=terms.C.detach(), u=terms.u.detach(), v=terms.v.detach())
    linear_with_update(x, W, b, held).sum().backward()
    assert x.grad is not None
    terms.u.grad = terms.v.grad = None
    linear_with_update(x, W, b, terms._replace(v=terms.v.detach())).sum().backward()
    assert terms.u.grad is not None and terms.v.grad is None


@pytest.mark.parametrize("own", [0, 2])
def test_k_wide_activations_are_all_that_is_kept(own):
    x, W, b, terms = operands(torch.float32, True, (50,), own)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_with_update(x, W, b, terms)
    # of the basis no copy, beside own directions neither; their gradient needs the input as it is
    known = {tensor.data_ptr() for tensor in (W, terms.V, terms.U, *terms.trained, *([x] if own else []))}
    assert [tuple(tensor.shape) for tensor in kept if tensor.data_ptr() not in known] == [(50, 3 + own)]


@pytest.mark.parametrize("coefficients", ["core", "factor", "diagonal", "directions"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extra_rank", [0, 2])
def test_a_training_step_is_that_of_the_plain_layers(coefficients, dtype, extra_rank, path, monkeypatch):
    # at the usual alpha the own part of such narrow layers is hundreds of times as large, and bfloat16 rounds it
    model = adapted(dtype=dtype, coefficients=coefficients, extra_rank=extra_rank, alpha=16.0)
    x = torch.randn(4, 6, dtype=dtype)

    def step() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(x).float().square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    fused = step()
    assert path == ["with base", "with base"] and len(fused) >= 2
    monkeypatch.setattr(kinds.Linear, "_with_first", lambda *_: None)
    monkeypatch.setattr(kinds.Linear, "_add_update", kinds.AdapterLayer._add_update)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.05}
    torch.testing.assert_close(fused, step(), **tolerance)


def watched(model: nn.Module, how: str) -> list[int]:
    seen: list[int] = []
    base = model.base_model.model.first.base_layer
    if how == "forward hook":
        base.register_forward_hook(lambda *_: seen.append(1))
    elif how == "pre-hook":
        base.register_forward_pre_hook(lambda *_: seen.append(1))
    elif how == "backward hook":
        base.register_full_backward_hook(lambda *_: seen.append(1))
    else:
        plain = base.forward
        base.forward = lambda x: (seen.append(1), plain(x))[1]
    return seen


@pytest.mark.parametrize("how", ["forward hook", "pre-hook", "backward hook", "own forward"])
def test_a_base_layer_that_someone_watches_is_called(how, path):
    model = adapted()
    wanted = model(torch.ones(2, 6))
    seen = watched(model, how)
    path.clear()
    torch.testing.assert_close(model(torch.ones(2, 6, requires_grad=True)), wanted)
    model(torch.ones(2, 6, requires_grad=True)).sum().backward()
    assert seen and path[:2] == (["with base"] * 2 if how == "backward hook" else ["in place", "with base"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "with base"),
        ({"dropout": 0.5}, "in place"),
        ({"bias": "all"}, "in place"),
        ({"trained": "first.base_layer.weight"}, "in place"),
        ({"no_grad": True}, "in place"),
        ({"autocast": True}, "in place"),
    ],
    ids=lambda value: str(value),
)
def test_what_the_fused_product_does_not_cover_goes_the_other_way(change, expected, path):
    change = dict(change)
    trained, no_grad, autocast = (change.pop(name, None) for name in ("trained", "no_grad", "autocast"))
    model = adapted(**change)
    if trained:
        model.base_model.model.get_parameter(trained).requires_grad_(True)
    with torch.set_grad_enabled(not no_grad), torch.autocast("cpu", torch.bfloat16, enabled=bool(autocast)):
        out = model(torch.randn(3, 6))
    assert path[0] == expected
    if trained:
        out.sum().backward()
        assert model.base_model.model.get_parameter(trained).grad.abs().sum() > 0


def test_several_active_adapters_and_disabled_ones(path):
    model = adapted()
    one = SubspaceConfig(basis="random", k=3, target_modules=["first", "second"], init_weights=False, seed=3)
    model.add_adapter("other", one)
    x = torch.randn(4, 6)
    model.base_model.set_adapter(["default", "other"])
    path.clear()
    both = model(x)
    assert path == ["with base", "in place"] * 2
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["default", "other"])
    torch.testing.assert_close(both, merged(x), rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        path.clear()
        model(x)
    assert path == []
