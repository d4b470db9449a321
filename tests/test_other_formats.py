"""Adapters of other programs, cut or rounded files, lists from other editors, and whole embeddings beside a LoRA."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForMaskedLM, ElectraConfig, ElectraForMaskedLM, PhiConfig, PhiForCausalLM

from subspace_peft import build_basis, compress_fleet, export_lora, load_task, project_lora
from subspace_peft.builders.build_file import read_build_file
from subspace_peft.cli import main
from subspace_peft.errors import SourceError, SubspaceError
from subspace_peft.sources import open_source

from .test_lora_variants import llama, logits, lora, trained

MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("plain") / "plain", 1, lora())


def like(plain: Path, folder: Path, change) -> Path:
    """A copy of an adapter with other tensors."""
    shutil.copytree(plain, folder)
    save_file(
        {k: change(v) for k, v in load_file(plain / "adapter_model.safetensors").items()},
        folder / "adapter_model.safetensors",
    )
    return folder


# -- forms of other programs
# ------------------------------------------------------------------------------------

r = torch.randn
MLX = {f"{MODULE}.lora_a": r(32, 4), f"{MODULE}.lora_b": r(4, 32)}
TORCHTUNE = {"layers.0.attn.q_proj.lora_a.weight": r(4, 32), "layers.0.attn.q_proj.lora_b.weight": r(32, 4)}
LITGPT = {"transformer.h.0.attn.attn.lora_A": r(8, 32), "transformer.h.0.attn.attn.lora_B": r(96, 4)}
NEMO = {
    f"model.decoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter.linear_{end}.weight": r(4, 32)
    for end in ("in", "out")
}
BRIDGE = {"module.decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight": r(4, 32)}
XLABS = {f"double_blocks.0.processor.proj_lora1.{end}.weight": r(4, 4) for end in ("down", "up")}
ADAPTERS = {f"bert.encoder.layer.0.attention.self.query.loras.task.lora_{side}": r(4, 4) for side in "AB"}


@pytest.mark.parametrize(
    ("tensors", "file", "named", "way"),
    [
        (MLX, "adapters.safetensors", "MLX", r"lora_a\.T.*lora_alpha = scale·r"),
        (MLX, "adapter_model.safetensors", "MLX", r"lora_a\.T"),
        (TORCHTUNE, "adapter_0.pt", "torchtune", "tune_to_peft_adapter_weights"),
        (TORCHTUNE, "lora.safetensors", "torchtune", "tune_to_peft_adapter_weights"),
        (LITGPT, "lit_model.pth.lora", "LitGPT", "merge_lora"),
        (NEMO, "adapter.safetensors", "NeMo", "export_lora"),
        (BRIDGE, "adapter.safetensors", "NeMo", "export_adapter_ckpt"),
        (XLABS, "flux.safetensors", "XLabs", "save_lora_adapter"),
        (ADAPTERS, "pytorch_adapter.bin", "AdapterHub", "PEFT"),
    ],
)
def test_adapters_of_other_programs_are_named_with_the_way_to_convert_them(tensors, file, named, way, tmp_path):
    place = tmp_path / "adapter" / file
    place.parent.mkdir()
    save_file(tensors, place) if file.endswith(".safetensors") else torch.save({"model": tensors}, place)
    if "adapter" in file:
        (place.parent / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "lora"}))
    if tensors is MLX:
        (place.parent / "adapter_config.json").write_text(json.dumps({"lora_parameters": {"rank": 4, "scale": 20.0}}))
    ways = [place, dict(tensors)]
    if file not in ("lora.safetensors", "flux.safetensors", "adapter.safetensors"):
        ways.append(place.parent)  # whose files' names say what it is
    for reference in ways:
        with pytest.raises(SourceError, match=f"{named}.*{way}"):
            open_source(reference, allow_bin=True)
    with pytest.raises(SourceError, match=named):
        build_basis([place], progress=False)


@pytest.mark.parametrize(("name", "named"), [("model.nemo", "NeMo"), ("lora-f16.gguf", "llama.cpp")])
def test_files_that_only_their_names_tell(name, named, tmp_path):
    (tmp_path / name).write_bytes(b"whatever")
    for reference in (tmp_path / name, tmp_path):
        with pytest.raises(SourceError, match=named):
            open_source(reference)


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("__0_0.distcp", "", "distributed checkpoint"),
        ("zero_to_fp32.py", "", "DeepSpeed"),
        ("adapter_config.json", '{"lora_parameters": {"rank": 8}}', "MLX"),
        ("adapter_config.json", '{"config": {"architecture": "lora"}, "model_class": "BertModel"}', "AdapterHub"),
    ],
)
def test_folders_that_their_files_tell(name, text, named, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(SourceError, match=named):
        open_source(tmp_path)


# -- parts of tensors, groups, and eight bits
# --------------------------------------------------------------------


@pytest.mark.parametrize("change", [lambda v: torch.empty(0), lambda v: v[:0], torch.flatten])
def test_tensors_that_were_not_gathered_are_told(plain, change, tmp_path):
    folder = like(plain, tmp_path / "shard", change)
    for way in (lambda: build_basis([folder], progress=False), lambda: open_source(folder).factors(MODULE)):
        with pytest.raises(SourceError, match=r"ZeRO-3 and FSDP.*GatheredParameters"):
            way()


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, groups=2)


def test_grouped_convolutions_are_told(tmp_path):
    model = get_peft_model(Grouped(), LoraConfig(r=4, target_modules=["conv"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "lora")
    for way in (model, tmp_path / "lora", get_peft_model_state_dict(model)):
        with pytest.raises(SourceError, match=r"'conv' is a convolution of 2 groups.*target_modules"):
            build_basis([way], progress=False)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_floats_of_eight_bits_are_read_as_they_are(plain, dtype, tmp_path):
    folder = like(plain, tmp_path / "fp8", lambda v: v.to(dtype))
    wide = like(plain, tmp_path / "fp32", lambda v: v.to(dtype).float())
    state = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    wanted = open_source(wide).factors(MODULE)
    for way in (folder, (state, config)):
        found = open_source(way).factors(MODULE)
        assert torch.equal(found.B, wanted.B) and torch.equal(found.A, wanted.A)
    basis = build_basis([folder], k=3, progress=False)
    assert basis.fingerprint == build_basis([wide], k=3, progress=False).fingerprint
    basis.save_pretrained(tmp_path / "basis")
    compress_fleet([folder], tmp_path / "basis", tmp_path / "bundle", progress=False)
    got, stock = load_task(llama(), tmp_path / "bundle", "fp8"), PeftModel.from_pretrained(llama(), wide)
    torch.testing.assert_close(logits(got), logits(stock), atol=1e-5, rtol=0)


# -- text from other editors
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_lists_settings_weights_and_configurations_may_have_a_byte_order_mark(plain, encoding, tmp_path):
    (tmp_path / "fleet.txt").write_text(f"# the fleet\n{plain}\n", encoding=encoding)
    (tmp_path / "build.yaml").write_text(f"sources: [{plain}]\nk: 3\n", encoding=encoding)
    (tmp_path / "weights.json").write_text('{"plain": 2}', encoding=encoding)
    copy = tmp_path / "copy"
    shutil.copytree(plain, copy)
    (copy / "adapter_config.json").write_text((plain / "adapter_config.json").read_text(), encoding=encoding)
    assert open_source(copy).scale(MODULE, 3) == pytest.approx(5 / 3)
    assert read_build_file(tmp_path / "build.yaml").settings == {"k": 3}
    weights = str(tmp_path / "weights.json")
    assert len(build_basis(str(tmp_path / "fleet.txt"), k=3, weights=weights, progress=False)) == 4
    assert main(["build", "--config", str(tmp_path / "build.yaml"), "--out", str(tmp_path / "basis"), "--quiet"]) == 0


# -- whole embeddings
# --------------------------------------------------------------------------------------------

Y = torch.tensor([[1, 2, 66, 67, 5, 69]])


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(Y).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "config", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}, {"target_modules": ["embed_tokens", "q_proj"]}]
)
def test_embeddings_saved_whole_after_added_tokens_go_with_the_task(tied, config, tmp_path):
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")

    def base() -> nn.Module:
        torch.manual_seed(3)
        model = type(llama()).from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(70)
        return model

    # PEFT saves them since the vocabulary is another one than the base model's on the disk
    folder = trained(tmp_path / "lora", 1, lora(**config), base)
    state = load_file(folder / "adapter_model.safetensors")
    whole = [key for key in state if key.endswith("embed_tokens.weight") or "embed_tokens.base_layer" in key]
    state[whole[0]][64:] = r(6, 32)
    save_file(state, folder / "adapter_model.safetensors")
    wanted = outputs(PeftModel.from_pretrained(base(), folder))
    build_basis([folder], k=3, progress=False).save_pretrained(tmp_path / "basis")
    project_lora(folder, tmp_path / "basis").save_pretrained(tmp_path / "task")
    compress_fleet([folder], tmp_path / "basis", tmp_path / "bundle", progress=False)
    export_lora(tmp_path / "task", tmp_path / "export")
    for got in (
        PeftModel.from_pretrained(base(), tmp_path / "task"),
        load_task(base(), tmp_path / "bundle", "lora"),
        PeftModel.from_pretrained(base(), tmp_path / "export"),
    ):
        torch.testing.assert_close(outputs(got), wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"trainable_token_indices": {"embed_tokens": [1, 2]}}, r"trainable_tokens_delta.*trainable_token_indices"),
        ({"bias": "all"}, r"bias.*bias='none'"),
    ],
)
def test_what_a_task_cannot_hold_is_refused_before_anything_is_said_of_it(config, reason, tmp_path, capsys):
    def base() -> nn.Module:
        return llama(attention_bias=True)

    folder = trained(tmp_path / "lora", 1, lora(**config), base)
    build_basis([trained(tmp_path / "other", 2, lora(), base)], k=3, progress=False).save_pretrained(
        tmp_path / "basis"
    )
    with pytest.raises(SubspaceError, match=reason):
        project_lora(folder, tmp_path / "basis")
    assert main(["project", str(folder), "--basis", str(tmp_path / "basis")]) == 1
    assert "faithful" not in capsys.readouterr().out
    with pytest.raises(SubspaceError, match=reason):
        compress_fleet([folder], tmp_path / "basis", tmp_path / "bundle", progress=False)


def test_tokens_that_no_basis_holds_are_said_where_it_is_built(tmp_path):
    with_tokens = trained(tmp_path / "tokens", 1, lora(trainable_token_indices={"embed_tokens": [1, 2]}))
    plain = trained(tmp_path / "plain", 2, lora())
    with pytest.warns(UserWarning, match=r"tokens: tokens were trained with the LoRA .*no basis holds"):
        basis = build_basis([with_tokens, plain], k=3, progress=False)
    assert any(key.endswith("trainable_tokens_delta") for key in basis.info["sources"][0]["left_out_tensors"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_basis([plain], k=3, progress=False)


WITH_BIAS = {
    "bert": (BertForMaskedLM, BertConfig, {"num_attention_heads": 2}, "query"),
    "electra": (ElectraForMaskedLM, ElectraConfig, {"embedding_size": 16, "num_attention_heads": 2}, "query"),
    "phi": (PhiForCausalLM, PhiConfig, {"num_attention_heads": 4}, "q_proj"),
}


@pytest.mark.parametrize("family", WITH_BIAS)
def test_a_whole_output_layer_goes_with_its_bias(family, tmp_path):
    model, config, more, target = WITH_BIAS[family]

    def base() -> nn.Module:
        torch.manual_seed(3)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 70}
        return model(config(**sizes, **more)).eval()

    made = get_peft_model(base(), LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
    for name, value in made.state_dict().items():
        if name.endswith("bias") and value.shape == (70,):
            value.normal_()
    made.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    wanted = outputs(PeftModel.from_pretrained(base(), tmp_path / "lora"))
    build_basis([tmp_path / "lora"], k=2, progress=False).save_pretrained(tmp_path / "basis")
    project_lora(tmp_path / "lora", tmp_path / "basis").save_pretrained(tmp_path / "task")
    compress_fleet([tmp_path / "lora"], tmp_path / "basis", tmp_path / "bundle", progress=False)
    for got in (PeftModel.from_pretrained(base(), tmp_path / "task"), load_task(base(), tmp_path / "bundle", "lora")):
        torch.testing.assert_close(outputs(got), wanted, atol=2e-5, rtol=0)
