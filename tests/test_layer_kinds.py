"""Convolutions and embeddings: the identities that hold for linear layers, and the way from LoRA and back."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from subspace_peft import SubspaceConfig, build_basis, export_lora, project_lora
from subspace_peft.errors import SubspaceError
from subspace_peft.tuner import SubspaceLayer

from .models import randomise

TARGETS = ["embed", "conv", "point", "lin"]


class Small(nn.Module):
    """Tokens → a picture of 6 × 6 → two convolutions (k × k with stride and padding, 1 × 1) → a linear layer."""

    def __init__(self, padding_mode: str = "zeros", groups: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 36)
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, padding_mode=padding_mode, groups=groups)
        self.point = nn.Conv2d(8, 6, 1)
        self.lin = nn.Linear(6 * 9, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids).view(len(ids), 4, 6, 6)
        return self.lin(torch.relu(self.point(torch.relu(self.conv(x)))).flatten(1))


IDS = torch.randint(0, 50, (3, 4), generator=torch.Generator().manual_seed(1))


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS)


def lora(folder, seed: int):
    model = get_peft_model(Small(), LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def basis(tmp_path):
    made = build_basis([lora(tmp_path / f"lora{i}", i) for i in range(3)], k=6, progress=False)
    made.save_pretrained(tmp_path / "basis")
    return made


@pytest.mark.parametrize("coefficients", ["core", "factor", "diagonal"])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_the_layer_computes_what_its_delta_weight_says(coefficients, padding_mode):
    config = SubspaceConfig(
        basis="random", k=3, r=2, coefficients=coefficients, target_modules=TARGETS, save_basis=True
    )
    base = Small(padding_mode)
    assert torch.equal(outputs(get_peft_model(Small(padding_mode), config)), outputs(base))
    model = randomise(get_peft_model(Small(padding_mode), config))
    expected = Small(padding_mode)
    with torch.no_grad():
        for name in TARGETS:
            layer = model.base_model.model.get_submodule(name)
            assert isinstance(layer, SubspaceLayer)
            expected.get_submodule(name).weight += layer.get_delta_weight("default")
    torch.testing.assert_close(outputs(model), outputs(expected), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(outputs(model), outputs(base), atol=1e-3)


def test_merging_saving_and_mixed_batches(basis, tmp_path):
    model = randomise(get_peft_model(Small(), SubspaceConfig(basis=basis)), seed=1)
    model.add_adapter("other", SubspaceConfig(basis=basis))
    model.set_adapter("other")
    randomise(model, seed=2)
    single = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        single[name] = outputs(model)
    with torch.no_grad():
        mixed = model.eval()(IDS, adapter_names=["other", "__base__", "default"])
    torch.testing.assert_close(mixed[0], single["other"][0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixed[1], outputs(Small())[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixed[2], single["default"][2], atol=1e-5, rtol=1e-4)
    model.set_adapter("default")
    model.save_pretrained(tmp_path / "task", selected_adapters=["default"])
    loaded = PeftModel.from_pretrained(Small(), tmp_path / "task")
    assert torch.equal(outputs(loaded), outputs(model))
    loaded.merge_adapter()
    torch.testing.assert_close(outputs(loaded), single["default"], atol=1e-4, rtol=1e-4)
    loaded.unmerge_adapter()
    torch.testing.assert_close(outputs(loaded), single["default"], atol=1e-5, rtol=1e-4)


def test_export_and_projection_go_through_stock_lora(basis, tmp_path):
    model = randomise(get_peft_model(Small(), SubspaceConfig(basis=basis, mean_gain="fixed")), seed=1)
    model.save_pretrained(tmp_path / "task")
    for source in (str(tmp_path / "task"), model):
        export_lora(source, tmp_path / "lora")
        torch.testing.assert_close(
            outputs(PeftModel.from_pretrained(Small(), tmp_path / "lora")), outputs(model), atol=1e-4, rtol=1e-4
        )
    inside = build_basis([tmp_path / "lora0", tmp_path / "lora1", tmp_path / "lora2"], k=9, progress=False)
    inside.save_pretrained(tmp_path / "wide")
    projection = project_lora(tmp_path / "lora1", inside)
    assert projection.energy_kept == pytest.approx(1, abs=1e-5)
    projection.save_pretrained(tmp_path / "projected")
    original = outputs(PeftModel.from_pretrained(Small(), tmp_path / "lora1"))
    projected = PeftModel.from_pretrained(Small(), tmp_path / "projected")
    torch.testing.assert_close(outputs(projected), original, atol=1e-4, rtol=1e-3)
    export_lora(str(tmp_path / "projected"), tmp_path / "back")
    torch.testing.assert_close(
        outputs(PeftModel.from_pretrained(Small(), tmp_path / "back")), original, atol=1e-4, rtol=1e-3
    )


def test_only_coefficients_get_gradients_and_they_are_the_chain_rules(basis):
    model = randomise(get_peft_model(Small(), SubspaceConfig(basis=basis)))
    model(IDS).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("subspace_coef" in name)
        if parameter.grad is not None:
            assert parameter.grad.abs().max() > 0


def test_grouped_convolutions_are_refused_before_the_model_is_touched():
    model = Small(groups=2)
    with pytest.raises(SubspaceError, match="without groups"):
        get_peft_model(model, SubspaceConfig(basis="random", k=2, target_modules=["conv"]))
    assert not any(isinstance(module, SubspaceLayer) for module in model.modules())


def test_rank_pattern_gives_modules_a_k_of_their_own(basis, tmp_path):
    config = SubspaceConfig(basis=basis, k=5, rank_pattern={"conv": 2, "l.n": 3})
    model = randomise(get_peft_model(Small(), config))
    sizes = {name: model.base_model.model.get_submodule(name).r["default"] for name in TARGETS}
    assert sizes == {"embed": (5, 5), "conv": (2, 2), "point": (5, 5), "lin": (3, 3)}
    model.save_pretrained(tmp_path / "task")
    assert torch.equal(outputs(PeftModel.from_pretrained(Small(), tmp_path / "task")), outputs(model))
    export_lora(str(tmp_path / "task"), tmp_path / "lora")
    torch.testing.assert_close(
        outputs(PeftModel.from_pretrained(Small(), tmp_path / "lora")), outputs(model), atol=1e-4, rtol=1e-4
    )
    with pytest.raises(SubspaceError, match=r"rank_pattern\['x'\]=0"):
        SubspaceConfig(rank_pattern={"x": 0})
    generated = SubspaceConfig(basis="random", k=4, rank_pattern={"lin": 2}, target_modules=TARGETS, save_basis=True)
    assert get_peft_model(Small(), generated).base_model.model.lin.r["default"] == (2, 2)


@pytest.mark.parametrize("made", [None, "random", "base-weights"])
def test_rank_pattern_gives_each_side_a_size_of_its_own(made, basis, tmp_path):
    pattern = {"conv": (2, 4), "l.n": [3, 1], "point": 2}
    where = {"basis": basis} if made is None else {"basis": made, "target_modules": TARGETS, "save_basis": True}
    config = SubspaceConfig(**where, k=5, rank_pattern=pattern)
    model = randomise(get_peft_model(Small(), config))
    sizes = {name: model.base_model.model.get_submodule(name).r["default"] for name in TARGETS}
    assert sizes == {"embed": (5, 5), "conv": (2, 4), "point": (2, 2), "lin": (3, 1)}
    model.save_pretrained(tmp_path / "task")
    saved = json.loads((tmp_path / "task" / "adapter_config.json").read_text())
    assert saved["rank_pattern"] == {"conv": [2, 4], "l.n": [3, 1], "point": 2}
    again = PeftModel.from_pretrained(Small(), tmp_path / "task")
    assert torch.equal(outputs(again), outputs(model))
    assert again.peft_config["default"].rank_pattern == config.rank_pattern


@pytest.mark.parametrize("k", [[2], [2, 3, 4], [2, 0], [2, None], [True, 2], [2.0, 2], "24", []])
def test_what_is_no_pair_of_sizes_is_refused(k):
    with pytest.raises(SubspaceError, match=r"rank_pattern\['x'\]=.*give a whole number .*\[k_out, k_in\]"):
        SubspaceConfig(rank_pattern={"x": k})


def test_a_side_that_the_basis_does_not_have_is_said(basis):
    with pytest.warns(UserWarning, match=r"rank_pattern\['lin'\]=\[2, 99\]: the basis has no more than"):
        get_peft_model(Small(), SubspaceConfig(basis=basis, rank_pattern={"lin": [2, 99]}))


@pytest.mark.parametrize("bias", ["all", "subspace_only"])
def test_biases_are_trained_and_saved_when_asked_for(basis, tmp_path, bias):
    model = randomise(get_peft_model(Small(), SubspaceConfig(basis=basis, bias=bias, target_modules=["lin", "conv"])))
    trained = {
        name for name, parameter in model.named_parameters() if parameter.requires_grad and name.endswith("bias")
    }
    assert len(trained) == {"all": 3, "subspace_only": 2}[bias]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.add_(1.0)
    model.save_pretrained(tmp_path / "task")
    assert torch.equal(outputs(PeftModel.from_pretrained(Small(), tmp_path / "task")), outputs(model))
    with pytest.raises(SubspaceError, match="choose one of none"):
        SubspaceConfig(bias="some")


def test_single_tokens_can_be_trained_as_in_lora(basis, tmp_path):
    model = get_peft_model(
        Small(), SubspaceConfig(basis=basis, target_modules=["lin"], trainable_token_indices={"embed": [3, 4]})
    )
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data.add_(1.0)
    randomise(model)
    changed = outputs(model)
    model.save_pretrained(tmp_path / "task")
    assert torch.equal(outputs(PeftModel.from_pretrained(Small(), tmp_path / "task")), changed)
