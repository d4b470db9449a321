"""LoRA files of diffusers and kohya, and adapters of PEFT's other methods, as sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file

from subspace_peft import build_basis
from subspace_peft.cli import main
from subspace_peft.errors import SourceError
from subspace_peft.sources import open_source
from subspace_peft.tuner import SubspaceLayer

from .models import bert, gpt2, inputs

# -- kohya
# ----------------------------------------------------------------------------------------------------------------

STEM = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def kohya(*stems: str, r: int = 2, alpha: float | None = 1.0, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for stem in stems:
        state[f"{stem}.lora_down.weight"] = torch.randn(r, 6, generator=generator)
        state[f"{stem}.lora_up.weight"] = torch.randn(8, r, generator=generator)
        if alpha is not None:
            state[f"{stem}.alpha"] = torch.tensor(alpha)
    return state


def write(state: dict[str, torch.Tensor], file: Path, **metadata: str) -> str:
    save_file(state, file, metadata=metadata)
    return str(file)


def test_kohyas_alpha_and_names_are_read(tmp_path):
    unet, text, text2 = (
        "lora_unet_" + STEM.replace(".", "_"),
        "lora_te_text_model_encoder_layers_11_mlp_fc1",
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
    )
    state = kohya(unet, text, text2, alpha=3.0)
    source = open_source(write(state, tmp_path / "style.safetensors"))
    names = [
        f"unet.{STEM}",
        "text_encoder.text_model.encoder.layers.11.mlp.fc1",
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj",
    ]
    assert sorted(source.keys) == sorted(names) and source.name == "style"
    update = source.factors(names[0])
    expected = 3.0 / 2 * state[f"{unet}.lora_up.weight"] @ state[f"{unet}.lora_down.weight"]
    torch.testing.assert_close((update.B @ update.A).float(), expected)
    # without an alpha the factors are the update
    source = open_source(write(kohya(unet, alpha=None), tmp_path / "plain.safetensors"))
    update = source.factors(f"unet.{STEM}")
    torch.testing.assert_close(update.B.float(), kohya(unet)[f"{unet}.lora_up.weight"])
    assert build_basis([source], k=2, progress=False).info["sources"][0]["scale"].startswith("1: ")


def test_a_fleet_of_kohya_files_with_ranks_of_their_own(tmp_path):
    stem = "lora_unet_" + STEM.replace(".", "_")
    files = [write(kohya(stem, r=r, alpha=a, seed=r), tmp_path / f"{r}.safetensors") for r, a in ((2, 1.0), (3, 6.0))]
    basis = build_basis(str(tmp_path / "*.safetensors"), k=5, progress=False)
    assert list(basis) == [f"unet.{STEM}"] and [entry["ranks"] for entry in basis.info["sources"]] == [[2], [3]]
    assert [entry["scale"] for entry in basis.info["sources"]] == [
        "alpha / rank of its file: 0.5",
        "alpha / rank of its file: 2",
    ]
    assert basis.info["measured"]["energy_kept"] == pytest.approx(1, abs=1e-6)
    assert build_basis(files, k=5, progress=False).fingerprint == basis.fingerprint


def change(state, stem, **values):
    return {key: value for key, value in state.items() if key.removeprefix(f"{stem}.") not in values} | {
        f"{stem}.{key}": value for key, value in values.items() if value is not None
    }


@pytest.mark.parametrize(
    ("stem", "values", "message"),
    [
        (
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            {},
            "cannot be told for certain.*save_lora_adapter",
        ),
        ("lora_unet_double_blocks_0_img_attn_qkv", {}, "cannot be told"),
        ("lora_transformer_h_0_attn", {}, "cannot be told"),
        ("diffusion_model.double_blocks.0.img_attn.qkv", {}, "cannot be told"),
        ("lora_unet_conv_in", {"dora_scale": torch.ones(8, 1)}, "dora_scale: DoRA"),
        ("lora_unet_conv_in", {"hada_w1_a": torch.ones(8, 1)}, "LoHa"),
        ("lora_unet_conv_in", {"lora_mid.weight": torch.ones(2, 2, 3, 3)}, "Tucker"),
        ("lora_unet_conv_in", {"diff_b": torch.ones(8)}, "full difference"),
        ("lora_unet_conv_in", {"lora_up.weight": None}, "incomplete"),
        ("lora_unet_conv_in", {"lora_up.weight": torch.full((8, 2), torch.nan)}, "NaN"),
        ("lora_unet_conv_in", {"lora_up.weight": torch.zeros(8, 2)}, "every lora_B is zero"),
        ("lora_unet_conv_in", {"lora_up.weight": torch.ones(8, 3)}, "do not multiply"),
    ],
)
def test_files_that_cannot_be_read_for_certain_are_refused(tmp_path, stem, values, message):
    file = write(change(kohya(stem), stem, **values), tmp_path / "bad.safetensors")
    with pytest.raises(SourceError, match=message) as caught:
        build_basis([file], progress=False)
    assert file in str(caught.value)


def test_a_file_without_lora_tensors_and_two_keys_of_one_module(tmp_path):
    with pytest.raises(SourceError, match="holds no LoRA tensors"):
        open_source(write({"x": torch.zeros(2)}, tmp_path / "other.safetensors"))
    state = kohya("lora_unet_conv_in") | kohya("unet.conv_in", alpha=None)
    with pytest.raises(SourceError, match=r"both of module 'unet\.conv_in'"):
        open_source(write(state, tmp_path / "twice.safetensors"))


def test_the_base_model_tells_what_names_alone_do_not(tmp_path):
    names = [name for name, _ in bert().named_modules() if name.endswith(("query", "value"))]
    state = {}
    for name in names:
        stem = "lycoris_" + name.replace(".", "_")
        state[f"{stem}.lora_down.weight"], state[f"{stem}.lora_up.weight"] = torch.randn(2, 32), torch.randn(32, 2)
    file = write(state, tmp_path / "lora.safetensors")
    with pytest.raises(SourceError, match="pass the model that it adapts as base_model"):
        open_source(file)
    assert sorted(open_source(file, base_model=bert()).keys) == sorted(names)
    assert len(build_basis([file], k=2, base_model=bert(), progress=False)) == len(names)


# -- diffusers
# --------------------------------------------------------------------------------------------------------------


def adapted_unet(seed: int, **config):
    from .test_diffusers import TARGETS, unet

    model = unet()
    torch.manual_seed(seed)
    config = {"r": 4, "lora_alpha": 6, "target_modules": [*TARGETS, "to_out.0"], "init_lora_weights": False, **config}
    model.add_adapter(LoraConfig(**config))
    return model


def assert_same_updates(source, model, prefix=""):
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")}
    assert {prefix + name for name in layers} == set(source.keys)
    for name, layer in layers.items():
        update, delta = source.factors(prefix + name), layer.get_delta_weight("default")
        torch.testing.assert_close((update.B @ update.A).float(), delta.flatten(1), atol=1e-6, rtol=1e-5)


def test_every_way_that_diffusers_saves_a_lora_gives_its_updates(tmp_path):
    pytest.importorskip("diffusers", reason="files that diffusers writes; diffusers is not installed")
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya

    model = adapted_unet(1)
    state = get_peft_model_state_dict(model)
    model.save_lora_adapter(tmp_path / "model")  # metadata of its own
    assert_same_updates(open_source(str(tmp_path / "model")), model)
    layers = convert_state_dict_to_diffusers(state)
    assert any(".lora.down" in key or ".lora_A" in key for key in layers)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "pipe", unet_lora_layers=layers, **_collate_lora_metadata({"unet": model})
    )
    assert_same_updates(open_source(str(tmp_path / "pipe")), model, "unet.")
    ours = {f"base_model.model.{key}": value for key, value in state.items()}
    flat = convert_state_dict_to_kohya(ours)
    for key in [key for key in flat if key.endswith(".alpha")]:
        flat[key] = torch.tensor(6.0)
    flat = {f"lora_unet_{key.replace('base_model_model_', '')}": value for key, value in flat.items()}
    source = open_source(write({key: v.contiguous() for key, v in flat.items()}, tmp_path / "k.safetensors"))
    assert_same_updates(source, model, "unet.")
    # names of the first attention processors' files
    old = {}
    for key, value in state.items():
        name = key.replace(".to_q.", ".processor.to_q_lora.").replace(".to_v.", ".processor.to_v_lora.")
        name = name.replace(".to_out.0.", ".processor.to_out_lora.").replace("lora_A", "down").replace("lora_B", "up")
        if "processor" in name:
            old[name] = value
    source = open_source(write(old, tmp_path / "old.safetensors"))
    assert {name.rsplit("attn", 1)[1].partition(".")[2] for name in source.keys} == {"to_q", "to_v", "to_out.0"}


def test_kohyas_names_are_read_back_to_those_of_the_whole_unet():
    pytest.importorskip("diffusers", reason="names of diffusers' modules; diffusers is not installed")
    from subspace_peft.sources.diffusers_kohya import _module

    from .test_diffusers import unet

    names = [n for n, m in unet().named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    assert len(names) > 60
    for name in names:
        assert _module("lora_unet_" + name.replace(".", "_"), False, {}) == f"unet.{name}"


def test_a_basis_of_diffusers_files_trains_on_the_unet(tmp_path):
    pytest.importorskip("diffusers", reason="files that diffusers writes; diffusers is not installed")
    from subspace_peft import SubspaceConfig

    from .test_diffusers import unet

    for seed in (1, 2):
        model = adapted_unet(seed)
        layers = {f"unet.{key}": value for key, value in get_peft_model_state_dict(model).items()}
        write(layers, tmp_path / f"{seed}.safetensors")
    basis = build_basis(str(tmp_path / "*.safetensors"), k=4, progress=False)
    model = unet()
    model.add_adapter(SubspaceConfig(basis=basis, save_basis=True))
    assert sum(isinstance(module, SubspaceLayer) for module in model.modules()) == len(basis)


# -- PEFT's other methods
# ---------------------------------------------------------------------------------------------------

OTHERS = {
    "loha": (lambda targets: LoHaConfig(r=2, alpha=4, target_modules=targets, init_weights=False), bert),
    "lokr": (lambda targets: LoKrConfig(r=2, alpha=4, target_modules=targets, init_weights=False), bert),
    "vera": (lambda targets: VeraConfig(r=4, target_modules=targets, init_weights=False), bert),
    "vblora on Conv1D": (
        lambda targets: VBLoRAConfig(
            r=2, topk=2, num_vectors=8, vector_length=16, target_modules=targets, fan_in_fan_out=True
        ),
        gpt2,
    ),
}


def trained(make, config, folder: Path, seed: int = 0):
    model = make()
    torch.manual_seed(seed)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "vera_lambda" in name or "vblora_logits" in name:
            parameter.data.normal_()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("method", OTHERS)
def test_other_methods_are_converted_and_the_loss_is_stated(tmp_path, method):
    config, make = OTHERS[method]
    targets = ["query", "value"] if make is bert else ["c_attn"]
    model = trained(make, config(targets), tmp_path / "a", 1)
    trained(make, config(targets), tmp_path / "b", 2)
    with pytest.raises(SourceError, match=r"Pass its base model, base_model= \(--base-model\)"):
        open_source(str(tmp_path / "a"))
    base = make()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    logits = base(inputs()).logits
    source = open_source(str(tmp_path / "a"), base_model=base)
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            delta = layer.get_delta_weight("default")
            delta = delta.T if make is gpt2 else delta
            update = source.factors(name.removeprefix("base_model.model."))
            error = (update.B @ update.A - delta.double()).norm() / delta.norm()
            assert error < 0.011  # a ten-thousandth of the energy
    assert 0 <= source.lost < 1.1e-4
    # the base model is as it was
    assert base.state_dict().keys() == before.keys() and all(
        torch.equal(base.state_dict()[k], v) for k, v in before.items()
    )
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert torch.equal(base(inputs()).logits, logits)
    basis = build_basis([str(tmp_path / "a"), str(tmp_path / "b")], k=8, base_model=base, progress=False)
    assert [entry["converted_from"] for entry in basis.info["sources"]] == [method.split()[0].upper()] * 2
    assert basis.info["sources"][0]["energy_lost_in_conversion"] == source.lost


def test_an_adapter_is_converted_on_its_backbone_too_and_not_on_a_stranger(tmp_path, capsys):
    trained(bert, LoKrConfig(r=2, target_modules=["query", "value"], init_weights=False), tmp_path / "a")
    whole = open_source(str(tmp_path / "a"), base_model=bert())
    bare = open_source(str(tmp_path / "a"), base_model=bert().bert)
    for name in bare.keys:
        one, two = bare.factors(name), whole.factors(f"bert.{name}")
        torch.testing.assert_close(one.B @ one.A, two.B @ two.A)
    for stranger in (gpt2(), bert(layers=1)):
        with pytest.raises(SourceError, match=r"LOKR adapter on|do not fit the base model given"):
            open_source(str(tmp_path / "a"), base_model=stranger)
    bert().save_pretrained(tmp_path / "base")
    arguments = [
        "build",
        str(tmp_path / "a"),
        "--out",
        str(tmp_path / "basis"),
        "--base-model",
        str(tmp_path / "base"),
    ]
    assert main([*arguments, "-k", "4", "--quiet"]) == 0
    assert json.loads((tmp_path / "basis" / "basis_config.json").read_text())["sources"][0]["converted_from"] == "LOKR"


def test_biases_and_unknown_methods_are_no_sources(tmp_path):
    model = get_peft_model(bert(), LoraConfig(target_modules=["query"], bias="lora_only", init_lora_weights=False))
    model.save_pretrained(tmp_path / "bias")
    with pytest.raises(SourceError, match=r"query.*bias.*trained with bias='lora_only' \(2 biases\)"):
        build_basis([str(tmp_path / "bias")], progress=False)
    trained(bert, LoKrConfig(r=2, target_modules=["query"], init_weights=False), tmp_path / "new")
    config = tmp_path / "new" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "NEWEST"}))
    with pytest.raises(SourceError, match="the installed PEFT knows no method NEWEST"):
        open_source(str(tmp_path / "new"), base_model=bert())


def test_a_converted_adapter_may_have_a_head(tmp_path):
    config = LoKrConfig(r=2, target_modules=["query"], init_weights=False, modules_to_save=["classifier"])
    trained(bert, config, tmp_path / "a")
    source = open_source(str(tmp_path / "a"), base_model=bert())
    assert [key.rsplit(".", 2)[1:] for key in source.other_keys] == [["classifier", "bias"], ["classifier", "weight"]]
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert all(torch.equal(source.read(key), saved[key]) for key in source.other_keys)
    assert PeftModel.from_pretrained(bert(), tmp_path / "a") is not None
