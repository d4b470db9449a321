"""Tensors, fields and base models beside the ordinary ones, in every form in which a source is given."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import save_file

from subspace_peft import SubspaceConfig, build_basis, compress_fleet, project_lora
from subspace_peft.base_names import difference, is_doubtful, relation
from subspace_peft.errors import BasisMismatchError, SourceError, SubspaceError
from subspace_peft.sources import open_source
from subspace_peft.sources.plain_lora import CONVERTED, FROM_OTHERS, NO_UPDATE, NOT_CONVERTED, method_problem

from .test_lora_variants import llama, logits, lora, through, trained

MODULE = "layers.0.q_proj"
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
FORMS = ("folder", "file", "state", "state and config")
UNET = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = f"lora_unet_{UNET.replace('.', '_')}"


def factors(module: str, adapter: str = "") -> dict[str, torch.Tensor]:
    name = f".{adapter}" if adapter else ""
    front = f"base_model.model.{module}"
    return {f"{front}.lora_A{name}.weight": torch.randn(4, 16), f"{front}.lora_B{name}.weight": torch.randn(16, 4)}


def given(form: str, tensors: dict[str, torch.Tensor], tmp_path: Path) -> object:
    if form == "state":
        return tensors
    if form == "state and config":
        return tensors, CONFIG
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    if form == "file":
        return folder / "adapter_model.safetensors"
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "tensors",
    [
        factors(MODULE, "a") | factors("layers.0.v_proj", "b"),
        factors(MODULE) | factors("layers.0.v_proj", "b"),
        {
            key: value
            for name in "ab"
            for key, value in factors(MODULE, name).items()
            if f"{name.upper()}.{name}" in key
        },
    ],
    ids=["two modules", "one without a name", "one module"],
)
def test_two_adapters_in_one_state_dict_are_not_taken_for_one(form, tensors, tmp_path):
    with pytest.raises(SourceError, match="several adapters"):
        open_source(given(form, tensors, tmp_path))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["mask", "gate", "scaler", "S", "weight_scale"])
def test_a_tensor_beside_the_factors_is_accounted_for_in_every_form(form, name, tmp_path):
    odd = {f"base_model.model.{MODULE}.{name}": torch.ones(16)}
    with pytest.raises(SourceError, match=rf"{MODULE}\.{name}: .*(without it|neither a factor)"):
        open_source(given(form, factors(MODULE) | odd, tmp_path))


@pytest.mark.parametrize("form", ["file", "state"])
def test_alphas_count_where_no_configuration_says_otherwise(form, tmp_path):
    alpha = {f"base_model.model.{MODULE}.alpha": torch.tensor(2.0)}
    source = open_source(given(form, factors(MODULE) | alpha, tmp_path))
    assert source.scale(MODULE, 4) == 0.5 and not source.scale_is_guessed


@pytest.mark.parametrize("front", ["base_model.model.", ""])
@pytest.mark.parametrize("name", ["", ".default"])
def test_a_module_at_the_top_of_the_model_is_read_from_a_file_alone(front, name, tmp_path):
    state = {f"{front}lm_head.lora_{side}{name}.weight": torch.randn(4, 4) for side in "AB"}
    assert list(open_source(given("file", state, tmp_path)).keys) == ["lm_head"]


def test_the_weights_of_a_layer_beside_its_factors_are_its_own():
    own = {f"{MODULE}.weight": torch.ones(16, 16), f"{MODULE}.bias": torch.ones(16)}
    assert list(open_source((factors(MODULE) | own, CONFIG)).keys) == [MODULE]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({".alpha": torch.tensor(float("nan"))}, "no finite number"),
        ({".alpha": torch.ones(3)}, "no finite number"),
        ({".lora_down.weight": torch.empty(0)}, "ZeRO-3"),
        ({".lora_down.weight": torch.tensor(1.0)}, "ZeRO-3"),
    ],
)
def test_a_kohya_file_with_odd_numbers_is_refused(change, reason):
    state = {".lora_down.weight": torch.randn(4, 16), ".lora_up.weight": torch.randn(16, 4)} | change
    with pytest.raises(SourceError, match=reason):
        build_basis([{KOHYA + end: value for end, value in state.items()}], progress=False)


def test_an_alpha_without_factors_is_no_whole_file():
    state = {f"{KOHYA}.lora_down.weight": torch.randn(4, 16), f"{KOHYA}.lora_up.weight": torch.randn(16, 4)}
    with pytest.raises(SourceError, match=r"to_k\.alpha: no factors"):
        open_source(state | {f"{KOHYA.replace('to_q', 'to_k')}.alpha": torch.tensor(2.0)})


@pytest.mark.parametrize("verb", ["build", "compress"])
def test_modules_to_save_are_matched_by_pefts_rule(verb, tmp_path):
    # `norm` means post_attention_layernorm as well
    pair = [trained(tmp_path / f"lora{n}", n, lora(modules_to_save=["norm"])) for n in range(2)]

    def adapters(name, number, config):
        return trained(tmp_path / f"lora{number}", number, config())

    got, wanted = through(verb, pair, adapters, tmp_path), logits(PeftModel.from_pretrained(llama(), pair[0]))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("field", sorted(FROM_OTHERS))
def test_what_other_programs_write_of_training_is_passed_over(field):
    assert open_source((factors(MODULE), CONFIG | {field: "x"})).scale(MODULE, 4) == 2.0


def test_a_base_model_with_adapters_is_refused_and_keeps_them(tmp_path):
    folder = trained(tmp_path / "dora", 1, lora(use_dora=True))
    model = get_peft_model(llama(), lora(init_lora_weights=False))
    before = logits(model)
    for base in (model, model.get_base_model()):
        with pytest.raises(SourceError, match="base model without adapters"):
            build_basis([folder], base_model=base, progress=False)
    assert torch.equal(logits(model), before)


def test_another_base_model_than_the_recorded_one_is_refused_where_it_is_given(tmp_path):
    folder = trained(tmp_path / "lora", 1, lora())
    basis = build_basis([folder], k=3, base_model=llama(), progress=False)
    basis.save_pretrained(tmp_path / "basis")
    torch.manual_seed(1)
    other = type(llama())(llama().config)
    with pytest.raises(BasisMismatchError, match="not the one of the basis"):
        project_lora(folder, basis, base_model=other)
    with pytest.raises(BasisMismatchError, match="not the one of the basis"):
        compress_fleet([folder], tmp_path / "basis", tmp_path / "bundle", base_model=other, progress=False)
    assert not (tmp_path / "bundle").exists()
    project_lora(folder, basis, base_model=llama())
    project_lora(folder, basis, base_model=other, check_base_model=False)


def test_a_whole_models_state_dict_is_told_from_trained_tensors(tmp_path):
    model = get_peft_model(llama(), lora(init_lora_weights=False))
    whole = (model.state_dict(), model.peft_config["default"])
    basis = build_basis([whole], k=3, progress=False)
    with pytest.raises(SubspaceError, match="get_peft_model_state_dict"):
        project_lora(whole, basis)


def test_conversion_is_offered_for_methods_that_have_one_only():
    for kind in CONVERTED:
        assert "it is converted" in method_problem(kind)
    for kind in NOT_CONVERTED:
        assert "base_model" not in method_problem(kind) and "Leave it out" in method_problem(kind)
    assert "does not have" in method_problem("ALORA")
    known = {str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - {"SUBSPACE", "LORA"}
    assert known <= CONVERTED | NOT_CONVERTED | NO_UPDATE


@pytest.mark.parametrize("front", ["diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize("form", ["file", "state"])
def test_names_of_an_original_checkpoint_are_told_in_every_form(form, front, tmp_path):
    state = {f"{front}blocks.0.self_attn.q.lora_{side}.weight": torch.randn(4, 4) for side in "AB"}
    with pytest.raises(SourceError, match="cannot be told for certain"):
        open_source(given(form, state, tmp_path))


def test_a_state_dict_of_something_else_than_tensors_is_told():
    state, litgpt = factors(MODULE), {"transformer.h.0.attn.qkv.lora_A": torch.ones(4, 4)}
    for odd, reason in (
        ({key: value.numpy() for key, value in state.items()}, "is a ndarray.*from_numpy"),
        (state | {"epoch": 3}, "'epoch' is a int"),
        ({"model": state}, "'model'. Pass that one alone"),
        ({"model": litgpt}, "LitGPT"),
        ({key: value.to("meta") for key, value in state.items()}, "meta device"),
    ):
        with pytest.raises(SourceError, match=reason):
            open_source(odd)


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("iter-1000-ckpt.pth.lora", "LitGPT"),
        ("ggml-adapter-model.bin", "llama.cpp"),
        ("global_step10/mp_rank_00_model_states.pt", "DeepSpeed"),
        ("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "DeepSpeed"),
        ("pytorch_model_fsdp_0/__0_0.distcp", "distributed checkpoint"),
    ],
)
def test_more_folders_that_their_files_tell(file, named, tmp_path):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"whatever")
    with pytest.raises(SourceError, match=named):
        open_source(tmp_path)


def test_a_pickle_of_another_program_is_named_by_what_is_inside(tmp_path):
    torch.save({"model": {"transformer.h.0.attn.qkv.lora_A": torch.ones(4, 4)}}, tmp_path / "lora_finetuned.pth")
    with pytest.raises(SourceError, match="LitGPT"):
        open_source(tmp_path / "lora_finetuned.pth", allow_bin=True)


def test_llama_cpps_names_are_not_taken_for_mlxs():
    with pytest.raises(SourceError, match=r"llama\.cpp"):
        open_source({"blk.0.attn_q.weight.lora_a": torch.ones(4, 4), "blk.0.attn_q.weight.lora_b": torch.ones(4, 4)})


def test_a_host_is_the_same_in_any_letter_case_and_a_mirror_is_no_folder():
    assert (
        relation("HF.co/org/llama", "org/llama") == relation("https://HuggingFace.co/org/llama", "org/llama") == "same"
    )
    assert "address" in difference("https://mirror.example/org/llama", "org/llama")


@pytest.mark.parametrize(
    ("one", "other", "doubtful"),
    [
        ("/gone/base-a", "/gone/base-b", True),
        ("/gone/llama", "/elsewhere/llama", False),  # moved, or another machine's
        ("org/llama", "/gone/llama", False),
        ("org/llama", "/gone/mistral", True),
        ("org/llama", "unsloth/llama-bnb-4bit", False),
        ("org/llama", "org/mistral", False),  # refused
        ("org/llama", "org/llama@main", False),
        ("org/llama", None, False),
    ],
)
def test_names_that_speak_for_two_models(one, other, doubtful):
    assert is_doubtful(one, other) is is_doubtful(other, one) is doubtful


def test_what_no_record_tells_of_two_folders_is_said_and_of_one_is_not(tmp_path):
    for name in ("a/base", "b/base"):
        llama().save_pretrained(tmp_path / name)

    def model(name: str) -> torch.nn.Module:
        return type(llama()).from_pretrained(tmp_path / name)

    folder = trained(tmp_path / "lora", 1, lora(), lambda: model("a/base"))
    build_basis([folder], k=3, progress=False).save_pretrained(tmp_path / "basis")
    project_lora(folder, tmp_path / "basis").save_pretrained(tmp_path / "task")
    ways = (
        lambda base: PeftModel.from_pretrained(base, tmp_path / "task"),
        lambda base: get_peft_model(base, SubspaceConfig(basis=str(tmp_path / "basis"))),
    )
    for way in ways:
        with pytest.warns(UserWarning, match="two folders both called 'base'.*No weights.*record_base_model"):
            way(model("b/base"))
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            way(model("a/base"))


@pytest.mark.parametrize(
    "module",
    [
        "mlp.experts",
        "mlp.shared_experts",
        "ffn.experts.mlp",
        "self_attention.experts.input_linear",
        "moe.output_linear",
    ],
)
def test_a_stack_of_experts_is_told_by_its_name_alone(module):
    state = {f"layers.0.{module}.lora_{side}.weight": torch.randn(8, 8) for side in "AB"}
    with pytest.raises(SourceError, match="stack of experts"):
        open_source(state)
    one = {f"layers.0.{module}.0.w1.lora_{side}.weight": torch.randn(8, 8) for side in "AB"}
    assert len(open_source(one).keys) == 1
