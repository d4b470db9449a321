"""Weighted combinations of tasks, in the space of their cores."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, ties

from subspace_peft import SubspaceConfig
from subspace_peft.errors import BasisMismatchError, SubspaceError

from .models import inputs, layers, randomise


def logits(model):
    with torch.no_grad():
        return model.eval()(inputs()).logits


def several(kind, basis, *configs: dict[str, object]) -> PeftModel:
    model = None
    for i, config in enumerate(configs):
        made = SubspaceConfig(basis=basis, **config)
        if model is None:
            model = get_peft_model(kind(), made, adapter_name="t0")
        else:
            model.add_adapter(f"t{i}", made)
    for i in range(len(configs)):
        model.set_adapter(f"t{i}")
        generator = torch.Generator().manual_seed(i)
        for name, parameter in model.named_parameters():
            if f"subspace_coef.t{i}." in name:
                parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


MIXED = ({}, {"coefficients": "factor", "r": 3}, {"coefficients": "diagonal", "mean_gain": "fixed"})


@pytest.mark.parametrize("combination", ["linear", "cat"])
def test_linear_merging_is_exactly_linear_in_the_updates(kind, bases, combination, tmp_path):
    model = several(kind, bases[kind], *MIXED)
    weights = [0.5, -1.25, 2.0]
    model.add_weighted_adapter(["t0", "t1", "t2"], weights, "sum", combination_type=combination)
    for layer in layers(model):
        expected = sum(w * layer.get_delta_weight(f"t{i}") for i, w in enumerate(weights))
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected, atol=1e-5, rtol=1e-4)
        assert layer.subspace_U["sum"] is layer.subspace_U["t0"]
    model.set_adapter("sum")
    merged = logits(model)
    model.save_pretrained(tmp_path / "all", selected_adapters=["sum"])
    assert torch.equal(logits(PeftModel.from_pretrained(kind(), tmp_path / "all" / "sum")), merged)


@pytest.mark.parametrize("combination", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_the_pruning_kinds_are_pefts_own_on_the_cores(kind, bases, combination):
    model = several(kind, bases[kind], {}, {})
    weights = torch.tensor([1.0, 0.7])
    torch.manual_seed(0)
    model.add_weighted_adapter(["t0", "t1"], [1.0, 0.7], "merged", combination_type=combination, density=0.5)
    function = {"ties": ties, "dare_linear": dare_linear, "dare_ties": dare_ties, "magnitude_prune": magnitude_prune}[
        combination
    ]
    torch.manual_seed(0)
    # the injection of the new adapter draws nothing, so that the random kinds can be repeated here
    for layer in layers(model):
        cores = [layer._core(name) * layer.scaling[name] for name in ("t0", "t1")]
        expected = function(cores, weights, 0.5)
        torch.testing.assert_close(layer._core("merged") * layer.scaling["merged"], expected, atol=1e-5, rtol=1e-4)


def test_svd_cuts_to_the_best_rank(kind, bases):
    model = several(kind, bases[kind], {}, {})
    model.add_weighted_adapter(["t0", "t1"], [1.0, 1.0], "small", combination_type="svd", svd_rank=2)
    for layer in layers(model):
        whole = layer.get_delta_weight("t0") + layer.get_delta_weight("t1")
        kept = layer.get_delta_weight("small")
        assert torch.linalg.matrix_rank(kept, rtol=1e-4) == 2
        P, S, Th = torch.linalg.svd(whole, full_matrices=False)
        torch.testing.assert_close(kept, (P[:, :2] * S[:2]) @ Th[:2], atol=1e-4, rtol=1e-3)


def test_self_contained_tasks_merge_too(kind, bases, tmp_path):
    for seed in (1, 2):
        model = get_peft_model(kind(), SubspaceConfig(basis=bases[kind], save_basis=True))
        randomise(model, seed=seed).save_pretrained(tmp_path / str(seed))
    model = PeftModel.from_pretrained(kind(), tmp_path / "1", "t1")
    model.load_adapter(tmp_path / "2", "t2")
    model.add_weighted_adapter(["t1", "t2"], [0.5, 0.5], "mean")
    for layer in layers(model):
        expected = (layer.get_delta_weight("t1") + layer.get_delta_weight("t2")) / 2
        torch.testing.assert_close(layer.get_delta_weight("mean"), expected, atol=1e-5, rtol=1e-4)
    model.set_adapter("mean")
    model.save_pretrained(tmp_path / "out", selected_adapters=["mean"])
    assert torch.equal(logits(PeftModel.from_pretrained(kind(), tmp_path / "out" / "mean")), logits(model))


def test_what_cannot_be_merged_is_refused(kind, bases, fleets):
    from subspace_peft import build_basis

    model = several(kind, bases[kind], {}, {"k": 3})
    other = build_basis(fleets[kind][:3], k=6, progress=False)
    model.add_adapter("elsewhere", SubspaceConfig(basis=other, save_basis=True))
    for arguments, error, message in (
        ((["t0", "t1"], [1, 1], "x"), BasisMismatchError, "their k"),
        ((["t0", "elsewhere"], [1, 1], "x"), BasisMismatchError, "basis_fingerprint"),
        ((["t0", "nobody"], [1, 1], "x"), SubspaceError, "no adapter nobody"),
        ((["t0"], [1, 1], "x"), SubspaceError, "1 adapters and 2 weights"),
        ((["t0"], [1], "t1"), SubspaceError, "already"),
        ((["t0"], [1], "x", "average"), SubspaceError, "choose one of linear"),
        ((["t0"], [1], "x", "ties"), SubspaceError, "needs a density"),
    ):
        with pytest.raises(error, match=message):
            model.add_weighted_adapter(*arguments)
        assert "x" not in model.peft_config
