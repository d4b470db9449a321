"""Tasks with own directions as stock LoRAs: the live model's update at rank k + φ, or its best approximation."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model

from subspace_peft import SubspaceConfig, build_basis, export_lora
from subspace_peft.cli import main
from subspace_peft.tuner import SubspaceLayer
from subspace_peft.tuner.coefficients import KINDS

from .bundle.conftest import logits
from .models import bert, gpt2, randomise
from .test_compress import deltas, updates
from .test_layer_kinds import Small, lora, outputs

PATTERNS = {bert: {"query": 3, "layer.0.attention.self.value": 0}, gpt2: {"h.1.attn.c_attn": 4}, Small: {"conv": 3}}


@pytest.fixture(scope="module")
def made(tmp_path_factory, bases):
    """Per kind of layers: a basis with direction tensors and a mean core."""
    root = tmp_path_factory.mktemp("small")
    small = build_basis([lora(root / f"s{i}", i) for i in range(3)], k=4, directions=3, progress=False)
    small.save_pretrained(root / "basis")
    return {Small: small, bert: bases[bert], gpt2: bases[gpt2]}


def trained(make, basis, seed: int = 5, **config) -> PeftModel:
    config = {"alpha": 4.0, "extra_rank": 2, **({"r": 2} if config.get("coefficients") == "factor" else {}), **config}
    model = randomise(get_peft_model(make(), SubspaceConfig(basis=basis, **config)).eval(), seed)
    with torch.no_grad():
        for layer in layers(model):
            if layer.own_part("default") is not None:
                # as large as the core, or nothing here would notice that they are missing
                own = layer.subspace_coef["default"]
                own.extra_U.mul_(layer.get_delta_weight("default").norm() / (own.extra_U @ own.extra_V).norm())
                own.extra_U.div_(layer.own_units(config["alpha"]).scale)
    return model


@pytest.mark.parametrize("pattern", [False, True], ids=["one rank", "pattern"])
@pytest.mark.parametrize("coefficients", KINDS)
@pytest.mark.parametrize("make", [Small, bert, gpt2], ids=["embedding, convolutions, linear", "linear", "conv1d"])
def test_the_export_is_the_live_models_update(make, coefficients, pattern, made, tmp_path):
    gain = "trainable" if coefficients == "none" else "fixed"
    more = {"extra_rank_pattern": PATTERNS[make]} if pattern else {}
    model = trained(make, made[make].location, coefficients=coefficients, mean_gain=gain, **more)
    model.save_pretrained(tmp_path / "task")
    run = outputs if make is Small else logits
    expected, live = run(model), updates(make, model)
    assert any(layer.own_part("default") is None for layer in layers(model)) == (pattern and make is bert)
    for source in (model, tmp_path / "task"):
        result = export_lora(source, tmp_path / "lora")
        torch.testing.assert_close(
            run(PeftModel.from_pretrained(make(), tmp_path / "lora")), expected, atol=1e-5, rtol=1e-4
        )
        written = deltas(make, tmp_path / "lora")
        assert written.keys() == live.keys()
        for name, delta in live.items():
            torch.testing.assert_close(written[name], delta, atol=1e-5, rtol=1e-4)
        assert result.rank == max(rank_of(layer) for layer in layers(model))
        assert result.energy_kept == 1
    # truncated: no other LoRA of that rank is nearer
    result = export_lora(model, tmp_path / "cut", rank=2)
    cut, lost, total = deltas(make, tmp_path / "cut"), 0.0, 0.0
    for name, delta in live.items():
        S = torch.linalg.svdvals(delta)
        assert float((delta - cut[name]).norm()) == pytest.approx(float(S[2:].norm()), rel=1e-3, abs=1e-5)
        lost, total = lost + float(S[2:].square().sum()), total + float(S.square().sum())
    assert result.rank == 2 and result.energy_kept == pytest.approx(1 - lost / total, abs=1e-5)


def layers(model):
    return [each for each in model.modules() if isinstance(each, SubspaceLayer)]


def rank_of(layer) -> int:
    sides = layer.subspace_U["default"].shape[1], layer.subspace_V["default"].shape[0]
    return min(sides) + layer.extra_rank.get("default", 0)


def test_own_directions_that_overlap_the_basis_are_no_further_rank_when_truncated(bases, tmp_path):
    """The update's rank is what counts: with u v inside the basis's span, rank k keeps all."""
    model = trained(bert, bases[bert].location, extra_rank=1)
    with torch.no_grad():
        for layer in layers(model):
            own = layer.subspace_coef["default"]
            own.extra_U.copy_(layer.subspace_U["default"][:, :1])
            own.extra_V.copy_(layer.subspace_V["default"][:1])
    assert export_lora(model, tmp_path / "whole").rank == 7
    cut = export_lora(model, tmp_path / "cut", rank=6)
    assert cut.rank == 6 and cut.energy_kept == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(bert(), tmp_path / "cut")), logits(model), atol=1e-5, rtol=1e-4
    )


def test_padding_dtypes_and_the_command_line(bases, tmp_path, capsys):
    model = trained(bert, bases[bert].location)
    model.save_pretrained(tmp_path / "task")
    assert export_lora(model, tmp_path / "vllm", pad_to="vllm").rank == 8
    assert export_lora(model, tmp_path / "half", dtype=torch.bfloat16, pad_to=16).rank == 16
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(bert(), tmp_path / "vllm")), logits(model), atol=1e-5, rtol=1e-4
    )
    assert main(["export-lora", str(tmp_path / "task"), "--out", str(tmp_path / "lora"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rank"] == 8
    with pytest.warns(UserWarning, match="the task's rank is 8"):
        assert main(["export-lora", str(tmp_path / "task"), "--out", str(tmp_path / "lora"), "--rank", "9"]) == 0


def test_what_is_exported_is_projected_again(bases, tmp_path):
    """There and back: task → LoRA → task with as many own directions computes the same."""
    from subspace_peft import project_lora

    model = trained(bert, bases[bert].location)
    export_lora(model, tmp_path / "lora")
    projection = project_lora(tmp_path / "lora", bases[bert], extra_rank=6)
    assert projection.energy_with_own == pytest.approx(1, abs=1e-6) and projection.energy_kept < 0.999
    projection.save_pretrained(tmp_path / "task")
    again = PeftModel.from_pretrained(bert(), tmp_path / "task")
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-4)
