"""`PeftMixedModel`: a task in a basis together with LoRA adapters, as PEFT's own methods are mixed."""

from __future__ import annotations

import copy
import inspect

import peft
import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
)
from peft.mapping import PEFT_TYPE_TO_MIXED_MODEL_MAPPING
from peft.tuners.lora import LoraLayer
from peft.tuners.mixed import model as mixed_tuner
from torch import nn

from subspace_peft import SubspaceConfig, build_basis
from subspace_peft._peft_hooks import join_mixed_models, register
from subspace_peft.errors import BasisMismatchError
from subspace_peft.tuner import SubspaceLayer, SubspaceModel

from .models import TARGETS, bert, gpt2, inputs, randomise, train_lora
from .test_layer_kinds import Small
from .test_layer_kinds import outputs as outputs_of_small

ORDERS = [("task", "plain"), ("plain", "task")]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(inputs()).logits


def lora_config(make) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[make], fan_in_fan_out=make is gpt2)


def fill(model: nn.Module) -> nn.Module:
    """Random numbers in every adapter, as if trained; the same for the same adapters in whatever order."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0].replace(".base_layer", "")):
        if "lora_" in name:
            parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return randomise(model, std=0.05)


def mixed_model(make, order, basis, **config) -> PeftMixedModel:
    configs = {"task": SubspaceConfig(basis=basis, **config), "plain": lora_config(make)}
    model = get_peft_model(make(), configs[order[0]], adapter_name=order[0], mixed=True)
    model.add_adapter(order[1], configs[order[1]])
    model.set_adapter(list(order))
    return fill(model)


def summed(make, model: PeftMixedModel, names) -> nn.Module:
    """The base model with the updates of the adapters `names` added to its weights by hand."""
    plain = make()
    with torch.no_grad():
        for path, layer in model.base_model.model.named_modules():
            if isinstance(layer, (LoraLayer, SubspaceLayer)):
                held = layer.subspace_coef if isinstance(layer, SubspaceLayer) else layer.scaling
                weight = plain.get_submodule(path.replace(".base_layer", "")).weight
                for name in (name for name in names if name in held):
                    weight += layer.get_delta_weight(name)
    return plain


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("coefficients", ["core", "factor", "diagonal", "directions"])
def test_the_updates_of_both_kinds_add_up(kind, bases, order, coefficients):
    model = mixed_model(kind, order, bases[kind], coefficients=coefficients)
    seen = [logits(kind())]
    for names in (["task", "plain"], ["plain", "task"], ["task"], ["plain"]):
        model.set_adapter(names)
        assert model.active_adapters == names
        close(logits(model), logits(summed(kind, model, names)))
        if names != ["plain", "task"]:
            assert all((logits(model) - other).abs().max() > 2e-4 for other in seen)
            seen.append(logits(model))


@pytest.mark.parametrize("order", ORDERS)
def test_disabled_is_the_base_bit_for_bit(kind, bases, order):
    model = mixed_model(kind, order, bases[kind])
    together = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(kind()))
    assert torch.equal(logits(model), together)


@pytest.mark.parametrize("order", ORDERS)
def test_merge_keeps_the_function_and_unmerge_restores_the_weights(kind, bases, order):
    model = mixed_model(kind, order, bases[kind])
    together, before = logits(model), copy.deepcopy(model.state_dict())
    model.merge_adapter()
    close(logits(model), together)
    weight = next(name for name in before if name.endswith("base_layer.weight"))
    assert not torch.allclose(model.state_dict()[weight], before[weight], atol=1e-3)
    model.unmerge_adapter()
    for name, value in model.state_dict().items():
        close(value, before[name])
    close(logits(model), together)
    with torch.no_grad():
        assert torch.equal(logits(copy.deepcopy(model).unload()), logits(model.disable_adapter_layers() or model))
    model.enable_adapter_layers()
    merged = model.merge_and_unload()
    close(logits(merged), together)
    assert not any(isinstance(module, (LoraLayer, SubspaceLayer)) for module in merged.modules())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("stored", ["basis beside", "basis in the task", "random basis"])
def test_saved_adapters_load_into_one_model(kind, bases, order, stored, tmp_path):
    how = {
        "basis beside": {"basis": bases[kind]},
        "basis in the task": {"basis": bases[kind], "save_basis": True},
        "random basis": {"basis": "random", "k": 5, "target_modules": TARGETS[kind]},
    }
    model = mixed_model(kind, order, **how[stored])
    alone = {}
    for name, config in (("task", SubspaceConfig(**how[stored])), ("plain", lora_config(kind))):
        single = fill(get_peft_model(kind(), config))
        alone[name] = logits(single)
        single.save_pretrained(tmp_path / name)
    loaded = PeftMixedModel.from_pretrained(kind(), tmp_path / order[0], order[0])
    assert torch.equal(logits(loaded), alone[order[0]])
    loaded.load_adapter(tmp_path / order[1], order[1])
    for name in order:
        loaded.set_adapter(name)
        close(logits(loaded), alone[name])
    loaded.set_adapter(list(order))
    together = logits(loaded)
    close(together, logits(summed(kind, loaded, order)))
    assert not torch.allclose(together, alone["task"], atol=1e-3)
    loaded.delete_adapter("plain")
    loaded.set_adapter("task")
    close(logits(loaded), alone["task"])
    assert set(loaded.peft_config) == {"task"}
    assert set(model.peft_config) == {"task", "plain"}


def test_what_does_not_fit_is_refused_before_the_model_is_touched(kind, bases, fleets, tmp_path):
    get_peft_model(kind(), SubspaceConfig(basis=bases[kind])).save_pretrained(tmp_path / "task")
    other = build_basis(fleets[kind][:2], k=3, progress=False)
    other.save_pretrained(tmp_path / "other")
    model = fill(get_peft_model(kind(), lora_config(kind), adapter_name="plain", mixed=True))
    before, modules = logits(model), [name for name, _ in model.named_modules()]
    with pytest.raises(BasisMismatchError, match=other.fingerprint[:8]):
        PeftMixedModel.from_pretrained(kind(), tmp_path / "task", basis=str(tmp_path / "other"))
    stranger = get_peft_model(kind(seed=5), lora_config(kind), adapter_name="plain", mixed=True)
    with pytest.raises(BasisMismatchError, match="weights are not those"):
        stranger.load_adapter(tmp_path / "task", "task")
    with pytest.raises(BasisMismatchError, match="not in the basis"):
        model.add_adapter("task", SubspaceConfig(basis=bases[kind], target_modules="all-linear"))
    assert modules == [name for name, _ in model.named_modules()]
    assert torch.equal(logits(model), before)
    assert set(model.peft_config) == {"plain"}


def test_the_rest_stays_pefts_own(kind, bases, tmp_path):
    model = mixed_model(kind, ORDERS[0], bases[kind])
    with pytest.raises(NotImplementedError, match="Saving is not supported for PeftMixedModel"):
        model.save_pretrained(tmp_path / "mixed")
    with pytest.raises(NotImplementedError, match="Weighted adapters are not supported for MixedModel"):
        model.add_weighted_adapter(["task", "plain"], [1.0, 1.0], "both")
    for config in (IA3Config(), PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")):
        with pytest.raises(ValueError, match="is not compatible with the `PeftMixedModel`"):
            model.add_adapter("no", config)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        get_peft_model(kind(), SubspaceConfig(basis=bases[kind])).add_adapter("plain", lora_config(kind))
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        get_peft_model(Small(), SubspaceConfig(basis="random", k=2), mixed=True)


def test_both_are_trained_and_nothing_else(kind, bases):
    model = mixed_model(kind, ORDERS[1], bases[kind]).train()
    model(inputs()).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("subspace_coef" in name or "lora_" in name), name
    model.set_adapter("plain")
    assert {
        name.split(".")[-3 if "lora" in name else -1] for name, p in model.named_parameters() if p.requires_grad
    } == {
        "lora_A",
        "lora_B",
    }
    model.set_adapter(["task"], inference_mode=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_second_task_on_top_shares_the_basis(kind, bases):
    model = mixed_model(kind, ORDERS[0], bases[kind])
    model.add_adapter("second", SubspaceConfig(basis=bases[kind]))
    assert len(
        {
            id(layer.subspace_U[name])
            for layer in model.modules()
            if isinstance(layer, SubspaceLayer)
            for name in layer.subspace_U
        }
    ) == len(bases[kind])
    fill(model)
    model.set_adapter(["task", "second", "plain"])
    close(logits(model), logits(summed(kind, model, ["task", "plain", "second"])))


@pytest.mark.parametrize("order", ORDERS)
def test_convolutions_and_embeddings_are_mixed_too(order):
    targets = ["embed", "conv", "point", "lin"]
    configs = {
        "task": SubspaceConfig(basis="random", k=3, target_modules=targets),
        "plain": LoraConfig(r=2, target_modules=targets),
    }
    model = get_peft_model(Small(), configs[order[0]], adapter_name=order[0], mixed=True)
    model.add_adapter(order[1], configs[order[1]])
    model.set_adapter(list(order))
    fill(model)
    together = outputs_of_small(model)
    torch.testing.assert_close(together, outputs_of_small(summed(Small, model, order)), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together, outputs_of_small(Small()), atol=1e-2)
    model.merge_adapter()
    torch.testing.assert_close(outputs_of_small(model), together, atol=1e-4, rtol=1e-4)
    assert all(layer.merged for layer in model.modules() if isinstance(layer, (LoraLayer, SubspaceLayer)))


OTHERS = {
    "LoHa": peft.LoHaConfig(r=4, init_weights=False),
    "LoKr": peft.LoKrConfig(r=4, init_weights=False),
    "AdaLoRA": peft.AdaLoraConfig(init_lora_weights=False, total_step=1),
    "OFT": peft.OFTConfig(oft_block_size=4, init_weights=False, use_cayley_neumann=False),
    "SHiRA": peft.ShiraConfig(r=4, init_weights=False),
}


def loud() -> nn.Module:
    """`bert` with a classifier of weights near 1: some of the methods start with updates too small for its own to
    show."""
    model = bert()
    model.classifier.weight.data *= 50
    return model


@pytest.mark.parametrize("first", ["task", "plain"])
@pytest.mark.parametrize("method", OTHERS)
def test_with_every_method_that_peft_mixes(bases, method, first):
    configs = {"task": SubspaceConfig(basis=bases[bert]), "plain": copy.deepcopy(OTHERS[method])}
    configs["plain"].target_modules = {"query", "value"}
    second = "plain" if first == "task" else "task"
    torch.manual_seed(0)
    model = get_peft_model(loud(), configs[first], adapter_name=first, mixed=True)
    if (method, second) == ("SHiRA", "plain"):
        with pytest.raises(ValueError, match="SHiRA does not support nested base layers"):
            model.add_adapter(second, configs[second])
        return
    model.add_adapter(second, configs[second])
    randomise(model, std=0.05)
    alone = []
    for name in (first, second):
        model.set_adapter(name)
        alone.append(logits(model))
    model.set_adapter([first, second])
    together = logits(model)
    assert all((together - other).abs().max() > 1e-3 for other in (*alone, logits(loud())))
    with model.disable_adapter():
        close(logits(model), logits(loud()))
    torch.testing.assert_close(logits(copy.deepcopy(model).merge_and_unload()), together, atol=1e-4, rtol=1e-4)
    model.delete_adapter(second)
    assert torch.equal(logits(model), alone[0])


def test_a_fleets_lora_and_its_basis_work_together(bases, tmp_path):
    """A task on top of one member of the fleet that the basis was built from, both read from their files."""
    source = train_lora(bert, tmp_path / "source", seed=10)
    task = randomise(get_peft_model(bert(), SubspaceConfig(basis=bases[bert], mean_gain="fixed")))
    task.save_pretrained(tmp_path / "task")
    model = PeftMixedModel.from_pretrained(bert(), source, "source")
    alone = logits(PeftModel.from_pretrained(bert(), source))
    assert torch.equal(logits(model), alone)
    model.load_adapter(tmp_path / "task", "task")
    model.set_adapter(["source", "task"])
    close(logits(model), logits(summed(bert, model, ["source", "task"])))
    assert not torch.allclose(logits(model), alone, atol=1e-3)


def test_joining_is_idempotent_and_asks_for_pefts_lists(monkeypatch):
    assert PEFT_TYPE_TO_MIXED_MODEL_MAPPING["SUBSPACE"] is SubspaceModel
    method = inspect.getattr_static(mixed_tuner.MixedModel, "_create_and_replace")
    register()
    assert join_mixed_models()
    assert mixed_tuner.PREFIXES.count("subspace_") == mixed_tuner.COMPATIBLE_TUNER_TYPES.count("SUBSPACE") == 1
    assert inspect.getattr_static(mixed_tuner.MixedModel, "_create_and_replace") is method
    monkeypatch.delattr(mixed_tuner, "PREFIXES")
    assert not join_mixed_models()
