"""Fields of a LoRA's configuration and tensors beside its factors: known, refused by name, or a guess that is said."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from subspace_peft import build_basis, project_lora
from subspace_peft.errors import SourceError
from subspace_peft.sources import open_source
from subspace_peft.sources.plain_lora import CONVERTIBLE, NEUTRAL, REASONS, config_problems

from .test_lora_variants import ATOL, llama, logits, lora, trained


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("plain") / "plain", 1, lora())


def changed(plain: Path, tmp_path: Path, config: dict | None = None, tensors: dict | None = None) -> Path:
    """A copy of an adapter with other fields (None: without the field) and further tensors."""
    folder = tmp_path / "changed"
    shutil.copytree(plain, folder, dirs_exist_ok=True)
    fields = json.loads((plain / "adapter_config.json").read_text()) | (config or {})
    fields = {name: value for name, value in fields.items() if value != "absent"}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    state = load_file(plain / "adapter_model.safetensors")
    save_file(state | (tensors or {}), folder / "adapter_model.safetensors")
    return folder


def test_every_field_of_the_installed_peft_is_known():
    """A new version of PEFT has to be read before its fields pass."""
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    if Version(peft.__version__).release[:2] <= (0, 21):
        assert not fields - NEUTRAL - REASONS.keys()
    assert not NEUTRAL & REASONS.keys() and set(CONVERTIBLE) <= REASONS.keys()
    assert config_problems(LoraConfig(target_modules=["q"]).to_dict()) == []
    variants = {field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")}
    # these two train otherwise, and compute s·B·A
    assert variants - {"velora_config", "monteclora_config"} <= REASONS.keys()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_newlora": True}, "use_newlora=True, which this package does not know.*written by PEFT"),
        ({"newlora_config": {"a": 1}, "peft_version": "9.1"}, r"newlora_config=.*written by PEFT 9\.1"),
        ({"kasa_config": {}}, "kasa_config"),  # PEFT makes a configuration of an empty dict, which switches it on
        ({"arrow_config": {"top_k": 2}}, "arrow_config"),
        ({"use_qalora": True}, "use_qalora"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication.*longer model"),
        ({"enable_lora": [True, False]}, "enable_lora"),
        ({"init_lora_weights": "milora"}, "'milora', which this package does not know"),
        ({"init_lora_weights": "CorDA"}, "changes the base weights"),
        ({"init_lora_weights": "loftq"}, "changes the base weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
        ({"megatron_config": {"tensor_model_parallel_size": 2}}, "tensor-parallel"),
        ({"peft_type": "XLORA"}, "XLORA, not LORA: it is no fixed update"),
        ({"peft_type": "PREFIX_TUNING"}, "no fixed update"),
    ],
)
def test_a_field_that_may_change_the_function_is_refused_by_its_name(plain, tmp_path, config, reason):
    with pytest.raises(SourceError, match=reason):
        open_source(changed(plain, tmp_path, config))
    state, fields = (
        load_file(plain / "adapter_model.safetensors"),
        json.loads((plain / "adapter_config.json").read_text()),
    )
    with pytest.raises(SourceError, match=reason):
        open_source((state, fields | config))


@pytest.mark.parametrize(
    "config", [{"newlora_config": {}}, {"use_newlora": False}, {"newlora": None}, {"x": []}, {"y": 0}]
)
def test_an_unknown_field_that_is_off_passes(plain, tmp_path, config):
    assert len(open_source(changed(plain, tmp_path, config)).keys) == 4


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lora_diag", "KaSA"),
        ("lora_E", "AdaLoRA"),
        ("lora_ranknum", "AdaLoRA"),
        ("lora_magnitude_vector", "DoRA"),
        ("lora_magnitude", "does not know"),
        ("lora_gate.weight", "does not know"),
        ("lora_mask", "does not know"),
        ("lora_scale", "does not know"),
        ("lora_A.bias", "lora_bias"),
        ("lora_B.bias", "lora_bias"),
        ("dora_scale", "no tensor of a LoRA"),
        ("vera_lambda_b", "no tensor of a LoRA"),
        ("hada_w1_a", "no tensor of a LoRA"),
        ("bias", "neither a factor nor"),
        ("weight", "neither a factor nor"),
        ("token_adapter.trainable_tokens_delta", "neither a factor nor"),
    ],
)
def test_a_tensor_beside_the_factors_is_refused_by_its_name(plain, tmp_path, name, reason):
    folder = changed(plain, tmp_path, tensors={f"{LAYER}.{name}": torch.ones(4)})
    with pytest.raises(SourceError, match=rf"{name}.*{reason}"):
        open_source(folder)
    state = load_file(folder / "adapter_model.safetensors")
    if "neither" not in reason:  # a state dict may be a whole model's
        for way in (state, (state, {"r": 3, "lora_alpha": 5})):
            with pytest.raises(SourceError, match=name):
                open_source(way)
    # a file without its configuration
    alone = tmp_path / "alone.safetensors"
    save_file(state, alone)
    if "lora_" in name:
        with pytest.raises(SourceError, match=name):
            open_source(alone)
    else:
        open_source(alone) if name in ("weight", "bias") else None


def test_metadata_of_diffusers_is_a_configuration_too(tmp_path):
    factors = {
        "transformer.a.to_q.lora_A.weight": torch.randn(3, 8),
        "transformer.a.to_q.lora_B.weight": torch.randn(8, 3),
    }

    def source(**config: object):
        fields = {f"transformer.{name}": value for name, value in config.items()}
        save_file(factors, tmp_path / "l.safetensors", {"lora_adapter_metadata": json.dumps(fields)})
        return open_source(tmp_path / "l.safetensors")

    assert source(r=3).scale("transformer.a.to_q", 3) == pytest.approx(8 / 3)
    with pytest.raises(SourceError, match="use_dora") as caught:
        source(r=3, use_dora=True)
    assert "base_model=" not in str(caught.value)


@pytest.mark.parametrize("r", [3, 8, 16])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_absent_lora_alpha_is_pefts_default(r, rslora, tmp_path):
    folder = trained(tmp_path / "lora", 1, lora(r=r, lora_alpha=8, use_rslora=rslora))
    without = changed(folder, tmp_path, {"lora_alpha": "absent"} | ({} if rslora else {"use_rslora": "absent"}))
    source = open_source(without)
    assert source.scale("model.layers.0.self_attn.q_proj", r) == pytest.approx(8 / (r**0.5 if rslora else r))
    basis = build_basis([without], k=r, progress=False)
    assert "no lora_alpha: PEFT's default of 8" in basis.info["sources"][0]["scale"]
    basis.save_pretrained(tmp_path / "basis")
    project_lora(without, tmp_path / "basis").save_pretrained(tmp_path / "task")
    got, wanted = (logits(PeftModel.from_pretrained(llama(), each)) for each in (tmp_path / "task", without))
    torch.testing.assert_close(got, wanted, atol=ATOL, rtol=0)


def test_an_absent_r_is_pefts_default(plain, tmp_path):
    with pytest.raises(SourceError, match="has no r, which means PEFT's default of 8"):
        open_source(changed(plain, tmp_path, {"r": "absent"})).factors("model.layers.0.self_attn.q_proj")
    folder = changed(trained(tmp_path / "eight", 1, lora(r=8)), tmp_path, {"r": "absent"})
    assert open_source(folder).scale("model.layers.0.self_attn.q_proj", 8) == pytest.approx(5 / 8)


def test_a_scale_that_nothing_says_is_a_guess_and_said_once(plain, tmp_path):
    state = load_file(plain / "adapter_model.safetensors")
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for number, file in enumerate(files):
        save_file({key: value + number * torch.randn_like(value) for key, value in state.items()}, file)
    with pytest.warns(
        UserWarning, match=r"one\.safetensors, .*two\.safetensors: no configuration and no alpha"
    ) as said:
        basis = build_basis(files, k=3, progress=False)
    assert len([each for each in said if "no alpha" in str(each.message)]) == 1
    assert said[0].filename == __file__
    assert {entry["scale"] for entry in basis.info["sources"]} == {"1: it came without its alpha"}
    with pytest.warns(UserWarning, match=r"one\.safetensors: no configuration"):
        project_lora(files[0], basis)
    # a configuration says it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        project_lora(plain, basis)
