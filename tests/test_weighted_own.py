"""Weighted combinations of tasks with directions of their own: exact sums, the best rank, and what pruning leaves."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from subspace_peft import SubspaceConfig
from subspace_peft.tuner import SubspaceLayer

from .models import bert, gpt2, inputs, layers
from .test_own_in_batches import TARGETS, Every

# of different kinds, with different numbers of own directions, and without any
TASKS: list[dict[str, Any]] = [
    {"extra_rank": 2},
    {"coefficients": "factor", "r": 3},
    {"coefficients": "diagonal", "extra_rank": 1, "extra_rank_pattern": {"value": 3, "conv": 0}},
]
WEIGHTS = [0.5, -1.25, 2.0]
NAMES = ["t0", "t1", "t2"]


def fill(model: PeftModel, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if f"subspace_coef.{name}." in key:
            std = 0.5 if "extra" in key else 0.1
            parameter.data.copy_(std * torch.randn(parameter.shape, generator=generator))


def several(make: Any, configs: list[dict[str, Any]], **basis: Any) -> PeftModel:
    model = None
    for i, config in enumerate(configs):
        made = SubspaceConfig(**basis, **config)
        if model is None:
            model = get_peft_model(make(), made, adapter_name="t0")
        else:
            model.add_adapter(f"t{i}", made)
    for i in range(len(configs)):
        fill(model, f"t{i}", i)
    return model.eval()


def flat(delta: torch.Tensor) -> torch.Tensor:
    return delta.flatten(1)


def summed(layer: SubspaceLayer, weights: list[float] = WEIGHTS) -> torch.Tensor:
    parts = [w * layer.get_delta_weight(f"t{i}") for i, w in enumerate(weights)]
    return torch.stack(parts).sum(0).detach()


MODELS = {
    "linear": (bert, lambda bases: {"basis": bases[bert]}),
    "conv1d": (gpt2, lambda bases: {"basis": bases[gpt2]}),
    "all kinds": (Every, lambda _: {"basis": "random", "k": 4, "target_modules": TARGETS, "save_basis": True}),
}


@pytest.fixture(params=MODELS)
def model(request, bases) -> PeftModel:
    make, basis = MODELS[request.param]
    made = several(make, TASKS, **basis(bases))
    made.make = make
    return made


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result = model.eval()(inputs()[:, :4] % 50)
    return getattr(result, "logits", result)


@pytest.mark.parametrize("combination", ["linear", "cat"])
def test_sums_are_exact_with_own_directions_side_by_side(model, combination, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.add_weighted_adapter(NAMES, WEIGHTS, "sum", combination_type=combination)
    for layer in layers(model):
        expected = summed(layer)
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected, atol=1e-5, rtol=1e-4)
        most = min(layer.out_features, layer.in_features)
        assert layer.extra_rank["sum"] == min(most, sum(layer.extra_rank[name] for name in NAMES))
        assert layer.subspace_U["sum"] is layer.subspace_U["t0"]
    model.set_adapter("sum")
    merged = run(model)
    model.save_pretrained(tmp_path / "all", selected_adapters=["sum"])
    assert torch.equal(run(PeftModel.from_pretrained(model.make(), tmp_path / "all" / "sum")), merged)


def test_the_present_scale_counts(model):
    for layer in layers(model):
        layer.set_scale("t0", 3.0)
    model.add_weighted_adapter(NAMES, WEIGHTS, "sum")
    for layer in layers(model):
        torch.testing.assert_close(layer.get_delta_weight("sum"), summed(layer), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rank", [1, 3, None])
def test_svd_cuts_core_and_own_directions_to_the_best_rank_together(model, rank):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.add_weighted_adapter(NAMES, WEIGHTS, "small", combination_type="svd", svd_rank=rank)
    default = max(max(layer.r[name]) + layer.extra_rank[name] for layer in layers(model) for name in NAMES)
    for layer in layers(model):
        whole, kept = summed(layer).double(), layer.get_delta_weight("small").double()
        P, S, T = torch.linalg.svd(flat(whole), full_matrices=False)
        cut = rank or default
        best = (P[:, :cut] * S[:cut]) @ T[:cut]
        torch.testing.assert_close(flat(kept), best, atol=1e-4 * float(S[0]), rtol=1e-3)
        assert torch.linalg.matrix_rank(flat(kept), rtol=1e-5) <= cut
        assert layer.extra_rank["small"] <= 2 * min(cut, sum(layer.extra_rank[name] for name in NAMES))


def test_own_directions_on_one_side_of_the_basis_are_cut_as_well(bases):
    """Where one side lies in the basis's span, more directions than ranks may be needed; what is kept is the best."""
    model = several(bert, [{"extra_rank": 2}, {}], basis=bases[bert])
    for layer in layers(model):
        own = layer.subspace_coef["t0"]
        with torch.no_grad():
            own.extra_U[:, 0] = layer.subspace_U["t0"][:, :2].sum(1)
            own.extra_V[1] = 1.7 * layer.subspace_V["t0"][0]
    for rank in (1, 2, 5):
        model.add_weighted_adapter(["t0", "t1"], [1.0, 0.5], f"r{rank}", combination_type="svd", svd_rank=rank)
        for layer in layers(model):
            whole = layer.get_delta_weight("t0").double() + 0.5 * layer.get_delta_weight("t1").double()
            P, S, T = torch.linalg.svd(whole)
            best = (P[:, :rank] * S[:rank]) @ T[:rank]
            kept = layer.get_delta_weight(f"r{rank}").double()
            torch.testing.assert_close(kept, best, atol=1e-4 * float(S[0]), rtol=1e-3)


@pytest.mark.parametrize("combination", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_pruning_leaves_own_directions_whole_and_says_so(bases, combination):
    model = several(bert, [{"extra_rank": 2}, {"extra_rank_pattern": {"query": 1}}, {}], basis=bases[bert])
    bare = several(bert, [{}, {}, {}], basis=bases[bert])
    for layer, other in zip(layers(model), layers(bare), strict=True):
        for name in NAMES:
            other.subspace_coef[name].weight.data.copy_(layer.subspace_coef[name].weight)
    how = {"combination_type": combination, "density": 0.5}
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"own directions are not: those of t0, t1 are added whole") as heard:
        model.add_weighted_adapter(NAMES, WEIGHTS, "merged", **how)
    assert [warning.filename for warning in heard if "own directions" in str(warning.message)] == [__file__]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        bare.add_weighted_adapter(NAMES, WEIGHTS, "merged", **how)
    for layer, other in zip(layers(model), layers(bare), strict=True):
        torch.testing.assert_close(layer._core("merged"), other._core("merged"))
        own = [(w, layer.own_part(name)) for name, w in zip(NAMES, WEIGHTS, strict=True)]
        expected = other.get_delta_weight("merged") + sum(w * B @ A for w, (B, A) in [p for p in own if p[1]])
        torch.testing.assert_close(layer.get_delta_weight("merged"), expected, atol=1e-5, rtol=1e-4)


def test_pruning_and_then_cutting_does_both(bases):
    model = several(bert, [{"extra_rank": 2}, {}, {}], basis=bases[bert])
    with pytest.warns(UserWarning, match="added whole"):
        model.add_weighted_adapter(NAMES, WEIGHTS, "pruned", combination_type="ties", density=0.5)
    with pytest.warns(UserWarning, match="added whole"):
        model.add_weighted_adapter(NAMES, WEIGHTS, "both", combination_type="ties_svd", density=0.5, svd_rank=2)
    for layer in layers(model):
        P, S, T = torch.linalg.svd(layer.get_delta_weight("pruned").double())
        kept = layer.get_delta_weight("both").double()
        torch.testing.assert_close(kept, (P[:, :2] * S[:2]) @ T[:2], atol=1e-4 * float(S[0]), rtol=1e-3)


@pytest.mark.parametrize("combination", ["linear", "svd"])
def test_adapters_may_have_different_modules(bases, combination):
    model = several(bert, [{"extra_rank": 2, "target_modules": ["query"]}, {"extra_rank": 1}], basis=bases[bert])
    model.add_weighted_adapter(["t0", "t1"], [2.0, -1.0], "sum", combination_type=combination, svd_rank=20)
    for layer in layers(model):
        held = [name for name in ("t0", "t1") if name in layer.subspace_coef]
        expected = sum({"t0": 2.0, "t1": -1.0}[name] * layer.get_delta_weight(name) for name in held)
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected, atol=2e-3, rtol=1e-4)
        assert layer.extra_rank["sum"] == (3 if len(held) == 2 else 1)


def test_adapters_without_own_directions_combine_as_before(bases):
    model = several(bert, [{}, {"coefficients": "factor", "r": 2}], basis=bases[bert])
    model.add_weighted_adapter(["t0", "t1"], [1.0, 1.0], "sum")
    model.add_weighted_adapter(["t0", "t1"], [1.0, 1.0], "cut", combination_type="svd")
    for name in ("sum", "cut"):
        assert model.peft_config[name].extra_rank == 0
        assert not model.peft_config[name].extra_rank_pattern
        assert not any("extra" in key for key, _ in model.named_parameters() if f".{name}." in key)
    assert model.peft_config["cut"].r == 6
