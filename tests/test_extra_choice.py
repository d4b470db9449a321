"""Which modules get directions of a task's own: those whose gradient the basis cannot follow."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from subspace_peft import SubspaceBasis, SubspaceConfig
from subspace_peft.basis import ModuleBasis
from subspace_peft.basis.controls import random_module
from subspace_peft.errors import SubspaceError
from subspace_peft.tuner import SubspaceLayer, choose_extra_ranks
from subspace_peft.tuner.extra_choice import GradientBeside, gradients_beside, spread_directions
from subspace_peft.tuner.patterns import exact_pattern

from .models import bert, gpt2, inputs, randomise

SIZES = {"a": (12, 20), "b": (12, 20), "c": (30, 8), "d": (6, 6)}


class Parallel(nn.Module):
    """Linear layers beside one another, each with an input of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, (out, size) in SIZES.items():
            setattr(self, name, nn.Linear(size, out, bias=False))

    def forward(self, x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name)(x[name]) for name in SIZES}


@pytest.fixture(scope="module")
def basis() -> SubspaceBasis:
    return SubspaceBasis({name: random_module(name, *size, 4, 3, 0) for name, size in SIZES.items()}, {"builder": "x"})


def beside(module: ModuleBasis, rank: int, size: float) -> torch.Tensor:
    """An update of a rank whose rows and columns are orthogonal to the basis."""
    draw = torch.Generator().manual_seed(1)
    B, A = (
        torch.randn(module.out_features, rank, generator=draw),
        torch.randn(rank, module.in_features, generator=draw),
    )
    B, A = B - module.U @ (module.U.T @ B), A - (A @ module.V.T) @ module.V
    return size * torch.linalg.qr(B)[0] @ torch.linalg.qr(A.T)[0].T


def model_and_loss(basis, wanted):
    """A model, and a loss whose gradient for each ΔW is minus what is wanted: half the distance, of unit inputs."""
    model = get_peft_model(Parallel(), SubspaceConfig(basis=basis, save_basis=True))
    plain = Parallel()

    def loss(model, batch):
        out = model(batch)
        goal = {name: plain(batch)[name] + batch[name] @ wanted[name].T for name in SIZES}
        return sum((out[name] - goal[name]).square().sum() for name in SIZES) / 2

    return model, loss, {name: torch.eye(size) for name, (_, size) in SIZES.items()}


def inside(basis) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    return {n: m.reconstruct(torch.randn(m.k_out, m.k_in, generator=draw)) for n, m in basis.items()}


def test_the_one_module_that_lacks_directions_is_found(basis):
    wanted = inside(basis)
    wanted["b"] = wanted["b"] + beside(basis["b"], 2, 3.0)
    model, loss, batch = model_and_loss(basis, wanted)
    for how in ({"budget": 10_000}, {"share": 1.0}, {"share": 0.999}, {"budget": 2 * 32}):
        assert choose_extra_ranks(model, [batch], loss=loss, **how) == (0, {"b": 2})
    assert choose_extra_ranks(model, [batch], loss=loss, budget=32) == (0, {"b": 1})
    assert choose_extra_ranks(model, [batch], loss=loss, budget=31) == (0, {})
    found = gradients_beside(model, [batch, batch], loss=loss)
    # of two batches the gradients add up, and the basis's part is not among it
    assert torch.allclose(found["b"].squares[:3], torch.tensor([36.0, 36.0, 0.0]).double(), atol=1e-3)
    assert all(float(found[name].squares.sum()) == 0 for name in "acd")
    assert found["b"].cost == 32 and found["b"].total > 72
    given = choose_extra_ranks(model, [batch], loss=loss, share=1.0)
    config = SubspaceConfig(basis=basis, save_basis=True, **given._asdict())
    layers = {m.key: m for m in get_peft_model(Parallel(), config).modules() if isinstance(m, SubspaceLayer)}
    assert {name: layer.extra_rank["default"] for name, layer in layers.items()} == {"a": 0, "b": 2, "c": 0, "d": 0}


def test_directions_go_where_a_parameter_gains_most(basis):
    wanted = {name: beside(basis[name], 1, size) for name, size in {"a": 1.0, "b": 2.0, "c": 2.1, "d": 1.0}.items()}
    model, loss, batch = model_and_loss(basis, wanted)

    def chosen(**how):
        return choose_extra_ranks(model, [batch], loss=loss, **how).extra_rank_pattern

    # squared norms 1, 4, 4.41 and 1; a direction costs 32, 32, 38 and 12
    assert chosen(budget=32) == {"b": 1} and chosen(budget=38) == {"b": 1}
    assert chosen(budget=32 + 12) == {"b": 1, "d": 1}
    assert chosen(budget=32 + 38) == {"b": 1, "c": 1}
    assert chosen(share=0.3) == {"b": 1} and chosen(share=0.8) == {"b": 1, "c": 1}
    assert choose_extra_ranks(model, [batch], loss=loss, share=1.0) == (1, {})


def explicit(layer: SubspaceLayer, weight: torch.Tensor) -> torch.Tensor:
    """What of a base weight's gradient, as a matrix, the basis leaves."""
    G = weight.grad.double()
    G = (
        G.flatten(1)
        if G.dim() == 4
        else G.T
        if layer.fan_in_fan_out or isinstance(layer.base_layer, nn.Embedding)
        else G
    )
    U, V = layer.subspace_U["default"].double(), layer.subspace_V["default"].double()
    return G - U @ (U.T @ G @ V.T) @ V


class Picture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.conv, self.last = nn.Embedding(50, 48), nn.Conv2d(3, 6, 3, 2, 1), nn.Linear(6, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.last(self.conv(self.words(ids).view(-1, 3, 4, 4)).mean((2, 3)))


@pytest.mark.parametrize("make", [bert, gpt2, Picture], ids=["linear", "conv1d", "conv2d and embedding"])
def test_the_sketch_has_the_singular_values_of_the_gradient(make, bases):
    where = (
        {"basis": "random", "target_modules": ["words", "conv", "last"]} if make is Picture else {"basis": bases[make]}
    )
    model = randomise(get_peft_model(make(), SubspaceConfig(**where, k=2, dropout=0.1)))
    ids = inputs()[:2, :5] % 50

    def loss(model, batch):
        out = model(batch)
        return getattr(out, "logits", out).square().sum()

    model.train()
    found = gradients_beside(model, [ids], loss=loss)
    assert model.training and all(p.grad is None for p in model.parameters())
    model.eval()
    layers = {m.key: m for m in model.modules() if isinstance(m, SubspaceLayer)}
    for layer in layers.values():
        layer.base_layer.weight.requires_grad_(True)
    loss(model, ids).backward()
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        rest = explicit(layer, layer.base_layer.weight)
        squares = torch.linalg.svdvals(rest).square()[: len(found[name].squares)]
        assert float(squares.sum()) > 0
        torch.testing.assert_close(found[name].squares, squares, rtol=2e-3, atol=1e-5 * float(squares[0]))


def test_leading_values_are_close_where_the_rank_is_higher():
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(120, 90, bias=False)), SubspaceConfig(basis="random", k=2, target_modules=["0"])
    )
    layer = next(m for m in model.modules() if isinstance(m, SubspaceLayer))
    P, T = (torch.linalg.qr(torch.randn(n, 80))[0] for n in (90, 120))
    G = (P * 0.7 ** torch.arange(80)) @ T.T
    batch = torch.eye(120)
    found = gradients_beside(model, [batch], loss=lambda model, x: (model(x) * G.T).sum())["0"]
    layer.base_layer.weight.grad = G
    true = torch.linalg.svdvals(explicit(layer, layer.base_layer.weight)).square()
    assert torch.allclose(found.squares[:4], true[:4], rtol=0.05)


def test_the_model_is_left_as_it_was_even_where_a_batch_fails(bases):
    model = randomise(get_peft_model(bert(), SubspaceConfig(basis=bases[bert])))
    model.train()
    model.base_model.model.classifier.eval()
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.grad = torch.ones_like(parameter)
    batch = {"input_ids": inputs(), "labels": torch.tensor([0, 1, 0])}
    choose_extra_ranks(model, [batch], share=0.5)
    with pytest.raises(SubspaceError, match="The model returns no loss"):
        choose_extra_ranks(model, [batch, {"input_ids": inputs()}], share=0.5)
    assert torch.equal(parameter.grad, torch.ones_like(parameter)) and parameter.requires_grad
    assert model.training and not model.base_model.model.classifier.training
    assert not any(m._forward_hooks for m in model.modules() if isinstance(m, SubspaceLayer))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({}, "Give budget="),
        ({"budget": 1, "share": 0.5}, "one of the two"),
        ({"budget": -1}, "budget=-1"),
        ({"budget": 1.5}, "budget=1.5"),
        ({"budget": 63}, "budget=63: one direction takes 64 parameters"),
        ({"share": 0}, "share=0"),
        ({"share": float("nan")}, "share=nan"),
        ({"share": 1.1}, "share=1.1"),
        ({"share": 0.5, "most": 0}, "most=0"),
        ({"share": 0.5, "most": 17}, "most=17: give a whole number from 1 to 16"),
        ({"share": 0.5, "width": 0, "most": 1}, "0"),
        ({"share": 0.5, "adapter_name": "other"}, "no task 'other'"),
        ({"share": 0.5, "batches": []}, "There is no batch"),
        ({"share": 0.5, "batches": [torch.ones(2)]}, "A batch is a Tensor.*give loss="),
        ({"share": 0.5, "loss": lambda model, batch: torch.tensor(float("nan"))}, "The loss of a batch is nan"),
        ({"share": 0.5, "loss": lambda model, batch: torch.ones(2)}, "The loss of a batch is Tensor"),
        ({"share": 0.5, "loss": lambda model, batch: torch.ones(())}, "does not depend on any adapted module"),
    ],
)
def test_bad_input_is_named(how, says, bases):
    model = get_peft_model(bert(), SubspaceConfig(basis=bases[bert]))
    batches = [{"input_ids": inputs(), "labels": torch.tensor([0, 1, 0])}]
    with pytest.raises(SubspaceError, match=says):
        choose_extra_ranks(model, how.pop("batches", batches), **how)
    with pytest.raises(SubspaceError, match="has no task"):
        gradients_beside(bert(), batches, adapter_name="default")


def test_spreading_alone():
    found = {
        "x": GradientBeside(torch.tensor([9.0, 4.0, 1.0]), 14.0, 10),
        "y": GradientBeside(torch.tensor([8.0, 0.0, 0.0]), 8.0, 5),
        "z": GradientBeside(torch.zeros(3), 0.0, 5),
    }
    assert spread_directions(found, budget=100) == {"x": 3, "y": 1, "z": 0}
    assert spread_directions(found, budget=100, most=1) == {"x": 1, "y": 1, "z": 0}
    assert spread_directions(found, budget=15) == {"x": 1, "y": 1, "z": 0}
    assert spread_directions(found, share=8 / 22) == {"x": 0, "y": 1, "z": 0}


@pytest.mark.parametrize(
    ("values", "default", "pattern"),
    [
        ({"a.q": 1, "b.q": 0}, 0, {"a.q": 1}),
        ({"q": 2, "a.q": 0, "a.v": 0}, 0, {"a.q": 0, "q": 2}),
        ({"q": 2, "a.q": 3}, 0, {"a.q": 3, "q": 2}),
        ({"q": 0}, 0, {}),
        ({"q": 5}, None, {"q": 5}),
    ],
)
def test_patterns_say_what_they_are_to(values, default, pattern):
    assert exact_pattern(values, default) == pattern and list(exact_pattern(values, default)) == list(pattern)
