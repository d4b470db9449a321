"""PEFT's own functions on models with tasks: what they answer, and what they do, is what they do for LoRA."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import check_if_peft_model, disable_input_dtype_casting, rescale_adapter_scale
from torch import nn
from transformers import BertConfig, T5Config

from subspace_peft import SubspaceConfig
from subspace_peft.errors import BasisMismatchError

from .models import TARGETS, bert, inputs, layers, randomise
from .test_layer_kinds import Small


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(inputs()).logits


@pytest.mark.parametrize("coefficients", ["core", "factor", "diagonal", "directions"])
def test_injection_by_a_state_dict_adapts_the_modules_that_it_names(kind, bases, coefficients):
    config = SubspaceConfig(basis=bases[kind], coefficients=coefficients)
    whole = randomise(inject_adapter_in_model(config, kind()))
    state = get_peft_model_state_dict(whole)
    some = {key: value for key, value in state.items() if key.startswith(tuple(list(bases[kind])[:1]))}
    assert 0 < len(some) < len(state)
    part = inject_adapter_in_model(copy.deepcopy(config), kind(), state_dict=some)
    assert set(get_peft_model_state_dict(part)) == set(some)
    again = inject_adapter_in_model(copy.deepcopy(config), kind(), state_dict=state, low_cpu_mem_usage=True)
    assert all(p.is_meta for layer in layers(again) for p in layer.subspace_coef.parameters())
    assert set_peft_model_state_dict(again, state, low_cpu_mem_usage=True).unexpected_keys == []
    assert torch.equal(logits(again), logits(whole))
    assert not torch.equal(logits(part), logits(whole))


def test_status_says_what_is_there(kind, bases):
    model = get_peft_model(kind(), SubspaceConfig(basis=bases[kind]), adapter_name="one")
    model.add_adapter("two", SubspaceConfig(basis=bases[kind], coefficients="diagonal"))
    model.set_adapter("two")
    status = get_model_status(model)
    assert status.base_model_type == type(kind()).__name__
    assert status.peft_types == {"one": "SUBSPACE", "two": "SUBSPACE"}
    assert status.available_adapters == ["one", "two"] and status.active_adapters == ["two"]
    assert status.enabled is True and status.merged_adapters == []
    assert status.num_adapter_layers == len(bases[kind])
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert status.requires_grad == {"one": False, "two": True}
    model.merge_adapter(["two"])
    with torch.no_grad():
        assert get_model_status(model).merged_adapters == ["two"]
    model.unmerge_adapter()
    with model.disable_adapter():
        assert get_model_status(model).enabled is False
    for layer in get_layer_status(model):
        assert layer.module_type == "subspace.Linear"
        assert layer.available_adapters == ["one", "two"] and layer.active_adapters == ["two"]
        assert {device for found in layer.devices.values() for device in found} == {"cpu"}
    assert {layer.name for layer in get_layer_status(model)} == {f"model.{name}" for name in bases[kind]}


def test_rescaling_is_scaling_the_update_and_comes_back(kind, bases):
    model = randomise(get_peft_model(kind(), SubspaceConfig(basis=bases[kind], mean_gain="fixed")))
    model.add_adapter("other", SubspaceConfig(basis=bases[kind]))
    before, delta = logits(model), [layer.get_delta_weight("default") for layer in layers(model)]
    scales = [dict(layer.scaling) for layer in layers(model)]
    with rescale_adapter_scale(model, 0.5):
        for layer, whole in zip(layers(model), delta, strict=True):
            torch.testing.assert_close(layer.get_delta_weight("default"), whole / 2)
        assert not torch.allclose(logits(model), before, atol=1e-3)
        half = logits(model)
    assert torch.equal(logits(model), before)
    assert [layer.scaling for layer in layers(model)] == scales
    for layer in layers(model):
        layer.set_scale("default", 0.5)
    assert torch.equal(logits(model), half)
    for layer in layers(model):
        layer.scale_layer(0.0)
    torch.testing.assert_close(logits(model), logits(kind()), atol=1e-6, rtol=1e-6)
    for layer in layers(model):
        layer.unscale_layer()
    assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="scaling is only supported"), rescale_adapter_scale(kind(), 0.5):
        pass
    lora = get_peft_model(kind(), LoraConfig(target_modules=TARGETS[kind]))
    with rescale_adapter_scale(lora, 0.5):
        scaling = next(module.scaling for module in lora.modules() if hasattr(module, "lora_A"))
        assert scaling == {"default": 0.5}


def test_other_helpers_know_the_method(bases, tmp_path):
    model = randomise(get_peft_model(bert(), SubspaceConfig(basis=bases[bert])))
    model.save_pretrained(tmp_path / "task")
    assert check_if_peft_model(str(tmp_path / "task"))
    with disable_input_dtype_casting(model):
        assert not any(layer.cast_input_dtype_enabled for layer in layers(model))
        assert torch.isfinite(logits(model)).all()
    assert all(layer.cast_input_dtype_enabled for layer in layers(model))


HEADS = {
    "FEATURE_EXTRACTION": ("BertModel", "FeatureExtraction"),
    "SEQ_CLS": ("BertForSequenceClassification", "SequenceClassification"),
    "TOKEN_CLS": ("BertForTokenClassification", "TokenClassification"),
    "QUESTION_ANS": ("BertForQuestionAnswering", "QuestionAnswering"),
    "CAUSAL_LM": ("BertLMHeadModel", "CausalLM"),
    "SEQ_2_SEQ_LM": ("T5ForConditionalGeneration", "Seq2SeqLM"),
    None: ("BertForMaskedLM", ""),
}


@pytest.mark.parametrize("task", HEADS)
def test_every_auto_class_loads_its_task(task, tmp_path):
    import transformers

    architecture, auto = HEADS[task]
    torch.manual_seed(0)
    if task == "SEQ_2_SEQ_LM":
        config = T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=100, decoder_start_token_id=0
        )
        batch, targets = {"input_ids": inputs(), "decoder_input_ids": inputs()}, ["q", "v"]
    else:
        size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        config = BertConfig(**size, vocab_size=100, is_decoder=task == "CAUSAL_LM")
        batch, targets = {"input_ids": inputs()}, ["query", "value"]
    base = getattr(transformers, architecture)(config).eval()
    base.save_pretrained(tmp_path / "base")
    # PEFT writes the class that the automatic one is to load into the config of a task of no type
    base = type(base).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, SubspaceConfig(basis="random", k=4, target_modules=targets, task_type=task))
    randomise(model).eval().save_pretrained(tmp_path / "task")
    loaded = getattr(peft, f"AutoPeftModel{'For' + auto if auto else ''}").from_pretrained(tmp_path / "task")
    assert isinstance(loaded, PeftModel) and type(loaded.get_base_model()) is type(base)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch)[0], model(**batch)[0])
        with model.disable_adapter():
            assert not torch.equal(model(**batch)[0], loaded(**batch)[0])


# -- what PEFT's own tests found
# ----------------------------------------------------------------------------------------


def test_a_layer_zero_is_a_layer():
    SubspaceConfig(basis="random", layers_to_transform=0, layers_pattern="layer")
    with pytest.raises(ValueError, match="`layers_to_transform` must also be specified"):
        SubspaceConfig(basis="random", layers_pattern="layer")


@pytest.mark.parametrize("generated", ["random", "base-weights"])
def test_a_configuration_of_a_generated_basis_serves_again(generated, tmp_path):
    config = SubspaceConfig(basis=generated, k=4, target_modules=["query"])
    first = randomise(get_peft_model(bert(), config))
    before = logits(first)
    first.save_pretrained(tmp_path / "first")
    config.target_modules = ["key", "value"]
    second = randomise(get_peft_model(bert(layers=3), config))
    assert set(config.basis_modules) == {
        f"bert.encoder.layer.{i}.attention.self.{name}" for i in range(3) for name in ("key", "value")
    }
    second.save_pretrained(tmp_path / "second")
    assert torch.equal(logits(PeftModel.from_pretrained(bert(layers=3), tmp_path / "second")), logits(second))
    assert torch.equal(logits(first), before)
    assert torch.equal(logits(PeftModel.from_pretrained(bert(), tmp_path / "first")), before)


@pytest.mark.parametrize("generated", ["random", "base-weights"])
def test_a_configuration_of_a_generated_basis_serves_another_models_weights(generated, tmp_path):
    config = SubspaceConfig(basis=generated, k=4, target_modules=["query"])
    first = layers(get_peft_model(bert(seed=0), config))[0].subspace_U["default"]
    model = randomise(get_peft_model(bert(seed=1), config))
    assert torch.equal(layers(model)[0].subspace_U["default"], first) == (generated == "random")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(bert(seed=1), tmp_path)), logits(model))


def test_a_configuration_used_before_serves_fewer_modules(kind, bases, tmp_path):
    config = SubspaceConfig(basis=bases[kind])
    get_peft_model(kind(), config)
    config.target_modules = [next(iter(bases[kind]))]
    model = randomise(get_peft_model(kind(), config))
    assert len(layers(model)) == 1
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(kind(), tmp_path)), logits(model))
    with pytest.raises(BasisMismatchError, match="weights are not those"):
        PeftModel.from_pretrained(kind(seed=1), tmp_path)


def test_pefts_conversion_is_for_matrices_only():
    for targets in (["conv", "lin"], ["embed"]):
        model = get_peft_model(Small(), SubspaceConfig(basis="random", k=2, target_modules=targets))
        assert not model.supports_lora_conversion()
        with pytest.raises(TypeError, match="do not support LoRA conversion"):
            convert_to_lora(model, rank=2)
    linear = get_peft_model(Small(), SubspaceConfig(basis="random", k=2, target_modules=["lin"]))
    assert linear.supports_lora_conversion()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_delta_weight_is_in_the_coefficients_dtype(kind, bases, dtype, autocast):
    config = SubspaceConfig(basis=bases[kind])
    model = randomise(get_peft_model(kind().to(dtype), config, autocast_adapter_dtype=autocast), std=0.01)
    expected = torch.float32 if autocast else dtype
    assert {layer.get_delta_weight("default").dtype for layer in layers(model)} == {expected}
    assert {value.dtype for value in convert_to_lora(model, rank=2)[1].values()} == {expected}
