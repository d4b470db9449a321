"""Live models as sources: what their layers do now counts; stacks of experts and attention in one, by every reader."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from subspace_peft import build_basis, project_lora
from subspace_peft.errors import SourceError
from subspace_peft.sources import open_source

from .test_lora_variants import ATOL, llama, logits, lora, sub


def live(config: peft.PeftConfig, make=llama):
    model = get_peft_model(make(), config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def basis_and_task(source, tmp_path: Path) -> torch.Tensor:
    build_basis([source], k=8, progress=False).save_pretrained(tmp_path / "basis")
    project_lora(source, tmp_path / "basis").save_pretrained(tmp_path / "task")
    return logits(PeftModel.from_pretrained(llama(), tmp_path / "task"))


@pytest.mark.parametrize("how", ["set_scale", "scale_layer", "merged", "wrapped", "transformers"])
def test_a_live_model_is_taken_as_it_acts(how, tmp_path):
    model = live(lora())
    layers = [layer for layer in model.modules() if hasattr(layer, "scale_layer")]
    if how == "set_scale":
        layers[0].set_scale("default", 0.25)
    elif how == "scale_layer":
        for layer in layers:
            layer.scale_layer(3.0)
    wanted = logits(model)
    if how == "merged":
        model.merge_adapter()
    if how == "wrapped":
        model = torch.compile(model, backend="eager")
    if how == "transformers":
        inner = llama()
        inner.add_adapter(lora())
        peft.set_peft_model_state_dict(inner, peft.get_peft_model_state_dict(model))
        model = inner.eval()
    torch.testing.assert_close(basis_and_task(model, tmp_path), wanted, atol=ATOL, rtol=0)


def test_several_active_adapters_are_refused_and_disabled_ones_are_said(tmp_path):
    model = live(lora())
    wanted = logits(model)
    model.add_adapter("second", lora())
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(SourceError, match=r"2 adapters of the model are active \(default, second\).*set_adapter"):
        open_source(model)
    model.set_adapter("default")
    model.disable_adapter_layers()
    with pytest.warns(UserWarning, match="adapters are disabled in the model; 'default' is read") as said:
        got = basis_and_task(model, tmp_path)
    assert said[0].filename == __file__
    torch.testing.assert_close(got, wanted, atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        ({"use_dora": True}, "use_dora"),
        ({"target_parameters": ["k_proj.weight"]}, "target_parameters"),
    ],
)
def test_a_live_variant_is_refused(variant, reason):
    model = live(lora(**variant))
    with pytest.raises(SourceError, match=reason):
        open_source(model)
    # what the layers do is asked as well
    for name in variant:
        setattr(model.peft_config["default"], name, None)
    with pytest.raises(SourceError, match=r"Variant computes something else|lora\.ParamWrapper|lora_magnitude"):
        open_source(model)


def test_live_variants_and_methods_are_converted_on_a_base_model():
    model = live(lora(kasa_config=sub("KasaConfig")))
    source = open_source(model, base_model=llama())
    assert source.converted == "KASA" and source.name == "default"
    model = get_peft_model(llama(), peft.LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False))
    assert open_source(model, base_model=llama()).converted == "LOHA"
    with pytest.raises(SourceError, match="no fixed update"):
        open_source(get_peft_model(llama(), peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")))


def test_a_layer_of_ones_own_is_refused():
    class Own(peft.tuners.lora.Linear):
        pass

    model = live(lora())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.__class__ = Own
    with pytest.raises(SourceError, match=r"q_proj: .*Own is no layer of PEFT's own LoRA"):
        open_source(model)


# -- experts and attention
# --------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.lin = nn.MultiheadAttention(16, 2), nn.Linear(16, 16)


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, num_hidden_layers=1, vocab_size=32, num_local_experts=4)).eval()


@pytest.mark.parametrize(
    ("make", "config", "reason"),
    [
        (
            mixtral,
            {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
            "experts",
        ),
        (mixtral, {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}, "experts"),
        (Attention, {"target_modules": ["attn", "lin"]}, "nn.MultiheadAttention"),
    ],
)
def test_stacks_of_experts_and_attention_in_one_are_refused_by_every_reader(make, config, reason, tmp_path):
    model = get_peft_model(make(), LoraConfig(r=2, init_lora_weights=False, **config))
    model.save_pretrained(tmp_path / "lora")
    state = peft.get_peft_model_state_dict(model)
    shutil.copy(tmp_path / "lora" / "adapter_model.safetensors", tmp_path / "alone.safetensors")
    for way in (model, state, (state, LoraConfig(r=2)), tmp_path / "lora", tmp_path / "alone.safetensors"):
        with pytest.raises(SourceError, match=reason):
            open_source(way)
        with pytest.raises(SourceError, match=reason):
            build_basis([way], progress=False)
