"""diffusers' own adapter calls on a tiny UNet, attention and convolutions adapted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from subspace_peft import SubspaceConfig, build_basis, export_lora, load_adapter, save_adapter
from subspace_peft.errors import BadFileError, SubspaceError
from subspace_peft.tuner import SubspaceLayer

from .models import bert, randomise

diffusers = pytest.importorskip("diffusers", reason="tests of diffusers' adapter calls; diffusers is not installed")

TARGETS = ["to_q", "to_v", "conv1"]


def unet() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def sample(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    noise, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    with torch.no_grad():
        return model(noise, 3, text).sample


def layers(model: nn.Module) -> dict[str, SubspaceLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SubspaceLayer)}


@pytest.fixture(scope="module")
def basis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unet")
    for number in range(2):
        base = unet()
        torch.manual_seed(number)  # after the model's own
        lora = get_peft_model(base, LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
        lora.save_pretrained(root / f"lora{number}")
    built = build_basis([str(root / f"lora{number}") for number in range(2)], k=4, progress=False)
    return built.save_pretrained(root / "basis")


@pytest.fixture
def model(basis: Path) -> nn.Module:
    """With the adapters a and b."""
    made = unet()
    for name, kind in (("a", "core"), ("b", "diagonal")):
        made.add_adapter(SubspaceConfig(basis=str(basis), coefficients=kind), name)
    randomise(made, std=0.03)
    made.set_adapter("a")
    return made


def shifted(model: nn.Module, weights: dict[str, float]) -> torch.Tensor:
    """What a plain UNet gives whose weights have the adapters' updates added by hand."""
    plain = unet()
    for name, layer in layers(model).items():
        for adapter, weight in weights.items():
            plain.get_submodule(name).weight.data += weight * layer.get_delta_weight(adapter)
    return sample(plain)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_add_set_disable_and_delete_adapters(model):
    kinds = {type(layer.get_base_layer()).__name__ for layer in layers(model).values()}
    assert kinds == {"Linear", "Conv2d"} and model.active_adapters() == ["a"]
    base, one = sample(unet()), sample(model)
    assert (one - base).abs().max() > 0.01
    assert_close(one, shifted(model, {"a": 1.0}))
    both, other = shifted(model, {"a": 0.5, "b": 2.0}), shifted(model, {"b": 1.0})
    model.set_adapters(["a", "b"], [0.5, 2.0])
    assert_close(sample(model), both)
    model.set_adapters("b")
    assert_close(sample(model), other)
    model.disable_lora()
    assert torch.equal(sample(model), base)
    model.enable_lora()
    model.set_adapters("a")
    model.delete_adapters("b")
    assert list(model.peft_config) == ["a"] and torch.equal(sample(model), one)
    model.unload_lora()
    assert not layers(model) and torch.equal(sample(model), base)


def test_fuse_and_unfuse(model):
    base, one = sample(unet()), sample(model)
    model.fuse_lora(safe_fusing=True)
    assert all(layer.merged for layer in layers(model).values())
    assert_close(sample(model), one)
    model.unfuse_lora()
    assert_close(sample(model), one)
    model.set_adapters(["a", "b"], [0.5, 2.0])
    both = sample(model)
    model.fuse_lora(adapter_names=["a", "b"])
    assert_close(sample(model), both)
    model.unload_lora()
    assert not layers(model)
    assert_close(sample(model), both)
    assert (both - base).abs().max() > 0.01


def test_only_coefficients_are_trained(model):
    noise, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    model.requires_grad_(False)
    model.set_adapter("a")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(layers(model)) and all(".subspace_coef.a." in name for name in trained)
    model.train()(noise, 3, text).sample.pow(2).mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())


def test_saving_and_loading(model, tmp_path):
    expected = sample(model)
    assert save_adapter(model, tmp_path / "task", "a") == tmp_path / "task"
    assert (tmp_path / "task" / "adapter_model.safetensors").stat().st_size < 8192
    assert model.peft_config["a"].inference_mode is False
    other = unet()
    load_adapter(other, tmp_path / "task", "mine")
    assert other.active_adapters() == ["mine"] and torch.equal(sample(other), expected)
    load_adapter(other, tmp_path / "task", "again")
    assert len({id(layer.subspace_U[name]) for layer in layers(other).values() for name in ("mine", "again")}) == len(
        layers(other)
    )
    other.set_adapters(["mine", "again"], [0.5, 0.5])
    assert_close(sample(other), expected)
    assert torch.equal(sample(PeftModel.from_pretrained(unet(), tmp_path / "task")), expected)


def test_models_without_adapter_calls_of_their_own(tmp_path):
    def plain() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    adapted = randomise(get_peft_model(plain(), SubspaceConfig(basis="random", k=4, target_modules=["0", "2"])))
    adapted.save_pretrained(tmp_path / "task")
    other = plain()
    load_adapter(other, tmp_path / "task")
    x = torch.randn(3, 8)
    assert torch.equal(other(x), adapted(x)) and not torch.equal(other(x), plain()(x))
    save_adapter(other, tmp_path / "again")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("task", "again"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_lora_exported_from_a_task_is_loaded_and_fused_by_diffusers(model, tmp_path):
    export_lora(model, tmp_path / "lora", adapter_name="a")
    other = unet()
    how = {"prefix": "base_model.model", "weight_name": "adapter_model.safetensors", "use_safetensors": True}
    other.load_lora_adapter(tmp_path / "lora", adapter_name="style", **how)
    assert {config.peft_type for config in other.peft_config.values()} == {"LORA"}
    assert_close(sample(other), sample(model))
    other.fuse_lora(adapter_names=["style"])
    assert_close(sample(other), sample(model))


def test_errors_say_what_to_do_and_leave_the_model_alone(model, tmp_path):
    with pytest.raises(SubspaceError, match=r"no adapter named 'c'; its adapters are a, b\. Add it"):
        save_adapter(model, tmp_path / "none", "c")
    with pytest.raises(SubspaceError, match=r"\(none\)"):
        save_adapter(unet(), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    save_adapter(model, tmp_path / "task", "a")
    with pytest.raises(SubspaceError, match="adapter 'a' already"):
        load_adapter(model, tmp_path / "task", "a")
    with pytest.raises(SubspaceError, match=r"model\.load_adapter\("):
        load_adapter(PeftModel.from_pretrained(unet(), tmp_path / "task"), tmp_path / "task")
    get_peft_model(bert(), LoraConfig(target_modules=["query"])).save_pretrained(tmp_path / "lora")
    other = unet()
    with pytest.raises(SubspaceError, match=r"LORA, not SUBSPACE.*load_lora_adapter"):
        load_adapter(other, tmp_path / "lora")
    with pytest.raises(SubspaceError, match="Pass the folder"):
        load_adapter(other, tmp_path / "nowhere")
    file = tmp_path / "task" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: value * float("nan") for key, value in tensors.items()}, file)
    with pytest.raises(BadFileError, match="NaN"):
        load_adapter(other, tmp_path / "task")
    file.unlink()
    with pytest.raises(SubspaceError, match=r"no adapter_model\.safetensors"):
        load_adapter(other, tmp_path / "task")
    assert not layers(other) and not hasattr(other, "peft_config")
    other.add_adapter(LoraConfig(target_modules=["to_q"]), "plain")
    with pytest.raises(SubspaceError, match="LORA adapter, not a SUBSPACE one"):
        save_adapter(other, tmp_path / "none", "plain")
