"""A configuration is data: fields and checks. The rest lives in the plan, in the layers, in one file of hooks."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import peft.helpers
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from transformers import AutoModelForSequenceClassification

from subspace_peft import SubspaceBasis, SubspaceConfig, _peft_hooks
from subspace_peft.basis import BasisReference, resolve_reference
from subspace_peft.bundle import bundle_tasks, load_task
from subspace_peft.errors import SubspaceError
from subspace_peft.tasks import load_adapter, save_adapter
from subspace_peft.tuner.injection import make_plan
from subspace_peft.tuner.loaded_from import LoadedFrom

from .models import bert, gpt2, inputs, layers, randomise

TARGETS = ("query", "value")
FIELDS = {field.name for field in dataclasses.fields(SubspaceConfig)}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=inputs()).logits


def in_memory(basis):
    return SubspaceBasis(dict(basis.items()), basis.info)


def test_a_configuration_has_its_fields_and_nothing_else(bases, basis_folder, tmp_path):
    made = SubspaceConfig(basis=bases[bert], coefficients="factor", r=2)
    assert vars(made).keys() == FIELDS
    model = get_peft_model(bert(), made)
    model.save_pretrained(tmp_path / "task")
    loaded = SubspaceConfig.from_pretrained(tmp_path / "task", basis=str(basis_folder), token="secret")
    for config in (made, loaded, copy.deepcopy(made), pickle.loads(pickle.dumps(loaded))):
        assert vars(config).keys() == FIELDS
        assert "loaded_from" not in config.to_dict()
    assert "secret" not in repr(loaded) + repr(loaded.basis_reference)
    assert b"secret" not in pickle.dumps(loaded)
    assert loaded.loaded_from.folder == tmp_path / "task"
    assert loaded.loaded_from.modules.keys() == {name for name, _ in bert().named_modules() if name.endswith(TARGETS)}


def test_a_file_cannot_say_where_it_was_read_from(bases, tmp_path):
    with pytest.raises(SubspaceError, match="loaded_from"):
        SubspaceConfig(loaded_from={"folder": "/etc"})
    assert SubspaceConfig(loaded_from=LoadedFrom()).to_dict() == SubspaceConfig().to_dict()


def test_where_a_basis_is_found_is_one_value(bases, basis_folder, tmp_path):
    get_peft_model(bert(), SubspaceConfig(basis=str(basis_folder))).save_pretrained(tmp_path / "task")
    config = SubspaceConfig.from_pretrained(tmp_path / "task")
    expected = BasisReference("../basis", None, bases[bert].fingerprint, near=tmp_path / "task")
    assert config.basis_reference == expected
    assert resolve_reference(config.basis_reference) == bases[bert]
    given = SubspaceConfig.from_pretrained(tmp_path / "task", basis=str(basis_folder))
    assert given.basis_reference == dataclasses.replace(expected, location=str(basis_folder), exact=True)


@pytest.mark.parametrize("basis", ["random", "base-weights", "memory", "folder"])
def test_a_plan_leaves_the_configuration_and_the_model_alone(bases, basis):
    given = {"memory": in_memory(bases[bert]), "folder": bases[bert].location}.get(basis, basis)
    model, config = bert(), SubspaceConfig(basis=given, k=2, target_modules=TARGETS, save_basis=True)
    before, names = copy.deepcopy(config), [name for name, _ in model.named_modules()]
    plan = make_plan(model, config, [name for name in names if name.endswith(TARGETS)])
    assert config == before
    assert [name for name, _ in model.named_modules()] == names
    assert plan.filled_in.keys() <= FIELDS
    assert plan.basis.fingerprint == plan.filled_in["basis_fingerprint"]


@pytest.mark.parametrize("basis", ["random", "base-weights", "folder"])
def test_one_configuration_serves_several_adapters_and_models(bases, basis):
    given = {"folder": bases[bert].location}.get(basis, basis)
    config = SubspaceConfig(basis=given, k=2, target_modules=list(TARGETS), save_basis=True)
    model = get_peft_model(bert(), config)
    model.add_adapter("second", config)
    other = get_peft_model(bert(), config)
    alone = get_peft_model(bert(), SubspaceConfig(basis=given, k=2, target_modules=list(TARGETS), save_basis=True))
    for made, adapter in ((model, "default"), (model, "second"), (other, "default")):
        for layer, wanted in zip(layers(made), layers(alone), strict=True):
            assert torch.equal(layer.subspace_U[adapter], wanted.subspace_U["default"])
            assert torch.equal(layer.subspace_V[adapter], wanted.subspace_V["default"])
    assert all(layer.subspace_U["default"] is layer.subspace_U["second"] for layer in layers(model))


def test_the_model_holds_the_basis_as_long_as_an_adapter_uses_it(basis_folder):
    model = get_peft_model(bert(), SubspaceConfig(basis=str(basis_folder)))
    fingerprint = model.peft_config["default"].basis_fingerprint
    assert model.base_model.bases["default"].fingerprint == fingerprint
    # found without a place, in this process
    model.add_adapter("second", SubspaceConfig(basis_fingerprint=fingerprint))
    assert model.base_model.bases["second"].fingerprint == fingerprint
    model.delete_adapter("default")
    assert model.base_model.bases.keys() == {"second"}


def test_copies_of_a_model_have_its_tensors_and_not_the_whole_basis(bases):
    model = randomise(get_peft_model(bert(), SubspaceConfig(basis=bases[bert].location, k=2)))
    expected = logits(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert copied.base_model.bases == {}
        assert torch.equal(logits(copied), expected)


@pytest.mark.parametrize("kind", [{"k": 3}, {"coefficients": "directions"}], ids=["part", "directions"])
@pytest.mark.parametrize("way", ["peft", "transformers", "injected"])
def test_a_basis_that_is_asked_for_later_is_carried_whole(bases, way, kind, tmp_path):
    given = {"basis": bases[bert].location, "mean_gain": "fixed", **kind}
    config, folder = SubspaceConfig(**given), tmp_path / "task"
    model = bert()
    if way == "peft":
        model = get_peft_model(model, config)
    elif way == "transformers":
        model.add_adapter(config, "default")
    else:
        inject_adapter_in_model(config, model)
        model.peft_config = {"default": config}
    expected = logits(randomise(model))
    config.save_basis = True
    model.save_pretrained(folder) if way != "injected" else save_adapter(model, folder, "default")
    known = SubspaceConfig(**given, save_basis=True)
    get_peft_model(bert(), known)
    saved = SubspaceConfig.from_pretrained(folder)
    assert saved.basis_modules == known.basis_modules
    saved.basis = None
    fresh = bert()
    load_adapter(fresh, folder)
    assert torch.equal(logits(fresh), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(bert(), folder)), expected)


@pytest.fixture
def later(bases, tmp_path):
    """Return a loaded task's model, whose basis was asked for after it was loaded, and the model's outputs."""
    randomise(get_peft_model(bert(), SubspaceConfig(basis=bases[bert].location))).save_pretrained(tmp_path / "plain")
    model = PeftModel.from_pretrained(bert(), tmp_path / "plain")
    model.peft_config["default"].save_basis = True
    return model, logits(model)


@pytest.mark.parametrize("way", ["saved", "read", "bundled"])
def test_saving_leaves_the_configuration_of_an_adapter_as_it_is(later, way, tmp_path):
    model, expected = later
    config = model.peft_config["default"]
    before = config.to_dict()
    if way == "saved":
        model.save_pretrained(tmp_path / "saved")
        assert SubspaceConfig.from_pretrained(tmp_path / "saved").basis_modules is not None
    elif way == "read":
        assert any("subspace_U" in key for key in get_peft_model_state_dict(model))
    else:
        bundle_tasks({"a": model}, tmp_path / "bundle")
        assert torch.allclose(logits(load_task(bert(), tmp_path / "bundle", "a")), expected, atol=1e-6)
    changed = {key for key, value in config.to_dict().items() if before[key] != value}
    assert changed <= {"card", "base_model_name_or_path", "auto_mapping"}
    # a loaded configuration starts at zero and finds its basis, however often it is used
    base = logits(bert())
    for _ in range(2):
        assert torch.equal(logits(get_peft_model(bert(), config)), base)
    model.add_adapter("second", config)
    model.set_adapter("second")
    assert torch.equal(logits(model), base)
    model.save_pretrained(tmp_path / "both")
    for name, outputs in (("", expected), ("second", base)):
        assert torch.equal(logits(PeftModel.from_pretrained(bert(), tmp_path / "both" / name)), outputs)


def test_a_file_and_its_configuration_agree_on_the_basis(later, tmp_path):
    model, expected = later
    # one that was replaced since the adapter was made
    model.peft_config["default"] = dataclasses.replace(model.peft_config["default"], save_basis=False)
    for asked in (True, False, True):
        config = model.peft_config["default"] = dataclasses.replace(model.peft_config["default"], save_basis=asked)
        model.save_pretrained(tmp_path / "saved")
        saved = SubspaceConfig.from_pretrained(tmp_path / "saved")
        assert (saved.basis_modules is not None) == asked
        assert config.basis_modules is None
        assert torch.equal(logits(PeftModel.from_pretrained(bert(), tmp_path / "saved")), expected)


def test_a_loaded_task_on_a_basis_in_memory_carries_it_from_then_on(bases, tmp_path):
    randomise(get_peft_model(bert(), SubspaceConfig(basis=bases[bert].location))).save_pretrained(tmp_path / "plain")
    with pytest.warns(UserWarning, match="lives in memory only"):
        model = PeftModel.from_pretrained(bert(), tmp_path / "plain", basis=in_memory(bases[bert]))
    config = model.peft_config["default"]
    # what `push_task` goes by
    assert config.basis_modules is not None
    model.save_pretrained(tmp_path / "saved")
    assert SubspaceConfig.from_pretrained(tmp_path / "saved").basis_modules == config.basis_modules
    assert torch.equal(logits(PeftModel.from_pretrained(bert(), tmp_path / "saved")), logits(model))
    assert torch.equal(logits(get_peft_model(bert(), config)), logits(bert()))


def test_a_combination_of_tasks_that_carry_their_mean_core_carries_none(bases, tmp_path):
    given = {"basis": bases[bert].location, "mean_gain": "fixed"}
    model = randomise(get_peft_model(bert(), SubspaceConfig(**given, save_basis=True)))
    model.save_pretrained(tmp_path / "first")
    for made in (model, PeftModel.from_pretrained(bert(), tmp_path / "first")):
        made.add_weighted_adapter(["default"], [0.5], "w")
        made.set_adapter("w")
        made.save_pretrained(tmp_path / "both")
        loaded = PeftModel.from_pretrained(bert(), tmp_path / "both" / "w")
        assert torch.equal(logits(loaded), logits(made))


def test_a_configuration_that_was_never_used_is_no_saved_task(bases, tmp_path):
    SubspaceConfig(basis=bases[bert].location, start="mean").save_pretrained(tmp_path)
    assert not SubspaceConfig.from_pretrained(tmp_path).loaded


def test_what_peft_lacks_is_said(monkeypatch):
    with monkeypatch.context() as patch:
        patch.delattr(peft.helpers, "LoraLayer")
        with pytest.warns(UserWarning, match="has no peft.helpers.LoraLayer"):
            _peft_hooks.allow_rescaling()
    for name, hook in (
        ("push_to_hub", _peft_hooks.push_as_tasks),
        ("create_or_update_model_card", _peft_hooks.write_own_cards),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(_peft_hooks, "PeftModel", type("PeftModel", (), {}))
            with pytest.warns(UserWarning, match=name):
                hook()
    from peft.utils import hotswap

    with monkeypatch.context() as patch:
        patch.delattr(hotswap, "CONFIG_KEYS_TO_CHECK")
        with pytest.warns(UserWarning, match="CONFIG_KEYS_TO_CHECK"):
            _peft_hooks.allow_hotswap()


def test_the_hooks_are_applied_once():
    methods = PeftModel.push_to_hub, PeftModel.create_or_update_model_card
    _peft_hooks.push_as_tasks()
    _peft_hooks.write_own_cards()
    assert (PeftModel.push_to_hub, PeftModel.create_or_update_model_card) == methods


def test_two_kinds_of_models_share_a_configuration_of_a_random_basis():
    config = SubspaceConfig(basis="random", k=2, target_modules=r".*(query|c_attn)")
    for model in (bert(), gpt2(), bert()):
        wrapped = get_peft_model(model, config)
        assert config.basis_modules.keys() == {
            name.removeprefix("base_model.model.")
            for name, module in wrapped.named_modules()
            if hasattr(module, "subspace_U")
        }


def test_stock_loading_knows_the_folder(bases, tmp_path):
    get_peft_model(bert(), SubspaceConfig(basis=bases[bert].location)).save_pretrained(tmp_path / "task")
    bert().save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model.load_adapter(tmp_path / "task")
    assert model.peft_config["default"].loaded_from == LoadedFrom(tmp_path / "task")
