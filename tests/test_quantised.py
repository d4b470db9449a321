"""Bases quantised by bitsandbytes, on the CPU: 8 bits, and 4 bits of both kinds, with and without quantised scales."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from subspace_peft import SubspaceConfig, build_basis
from subspace_peft.errors import BasisMismatchError, SubspaceError
from subspace_peft.tuner import targets
from subspace_peft.tuner.targets import base_weight

from .models import layers, randomise

bitsandbytes = pytest.importorskip(
    "bitsandbytes", reason="quantised bases are read through bitsandbytes; it is not installed"
)

FOUR = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
KINDS = {
    "8bit": {"load_in_8bit": True},
    "nf4": {**FOUR, "bnb_4bit_quant_type": "nf4"},
    "fp4": {**FOUR, "bnb_4bit_quant_type": "fp4"},
    "nf4-double": {**FOUR, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}
TARGETS = ["q_proj", "v_proj", "down_proj"]
X = torch.randint(1, 99, (3, 6), generator=torch.Generator().manual_seed(2))


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base model, another one, and a basis built from three adapters of the first."""
    root = tmp_path_factory.mktemp("quantised")
    llama().save_pretrained(root / "base")
    llama(seed=1).save_pretrained(root / "other")
    for number in range(3):
        base = llama()
        torch.manual_seed(number)  # after the model's own
        model = get_peft_model(base, LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
        model.save_pretrained(root / f"lora{number}")
    build_basis([str(root / f"lora{number}") for number in range(3)], k=6, progress=False).save_pretrained(
        root / "basis"
    )
    return {name: root / name for name in ("base", "other", "basis")}


def load(folder: Path, kind: str | None, dtype: torch.dtype = torch.float32) -> nn.Module:
    given = (
        {} if kind is None else {"quantization_config": BitsAndBytesConfig(**KINDS[kind]), "device_map": {"": "cpu"}}
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **given).eval()


def adapted(folders: dict[str, Path], base: nn.Module, **given: int) -> PeftModel:
    config = SubspaceConfig(basis=str(folders["basis"]), task_type="CAUSAL_LM", **given)
    return randomise(get_peft_model(base, config), std=0.01).eval()


def logits(model: nn.Module, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(X, **kwargs).logits


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_saved_mixed_and_disabled_give_the_same_outputs(folders, tmp_path, kind, dtype):
    model = adapted(folders, load(folders["base"], kind, dtype))
    assert model.get_model_status().quantization_backend == ("bnb 8bit" if kind == "8bit" else "bnb 4bit")
    with model.disable_adapter():
        base = logits(model)
    one = logits(model)
    assert (one - base).abs().max() > 0.02
    # what is added in place where no gradient is asked for, and where one is
    torch.testing.assert_close(model(X).logits.detach(), one)
    model.save_pretrained(tmp_path / "task")
    assert (tmp_path / "task" / "adapter_model.safetensors").stat().st_size < 4096
    assert torch.equal(logits(PeftModel.from_pretrained(load(folders["base"], kind, dtype), tmp_path / "task")), one)
    model.load_adapter(tmp_path / "task", "two")
    randomise(model, seed=4, std=0.01)
    model.set_adapter("two")
    two = logits(model)
    model.set_adapter("default")
    randomised = logits(model)
    rows = logits(model, adapter_names=["two", "__base__", "default"])
    # a product of 8-bit numbers is exact; half precision rounds what is added, in another order
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
    for row, expected in enumerate((two, base, randomised)):
        torch.testing.assert_close(rows[row], expected[row], **close)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.train()(X, labels=X).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("own", [0, 2])
def test_gradients_are_those_of_the_dequantised_weights_before_and_after_an_evaluation(folders, kind, own):
    model = adapted(folders, load(folders["base"], kind), extra_rank=own)
    plain = load(folders["base"], None)
    for name, given in model.base_model.model.named_modules():
        if isinstance(given, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)):
            plain.get_submodule(name.replace(".base_layer", "")).weight.data.copy_(base_weight(given))
    expected = gradients(adapted(folders, plain, extra_rank=own))
    # 8-bit layers round their inputs too
    tolerance = 0.05 if kind == "8bit" else 1e-4
    for _ in range(2):
        found = gradients(model)
        assert found.keys() == expected.keys() and all("subspace_coef" in name for name in found)
        for name, value in found.items():
            assert (value - expected[name]).norm() < tolerance * expected[name].norm(), name
        logits(model.eval())


def test_a_base_that_was_evaluated_before_is_adapted_all_the_same(folders, kind):
    base = load(folders["base"], kind)
    weights = {name: base_weight(base.get_submodule(name)) for name in ("model.layers.0.self_attn.q_proj", "lm_head")}
    before = logits(base)
    model = adapted(folders, base)
    with model.disable_adapter():
        # some CPUs compute what they only evaluate in bfloat16
        torch.testing.assert_close(logits(model), before, atol=0.02, rtol=0.02)
    for name, weight in weights.items():
        now = base_weight(model.base_model.model.get_submodule(name))
        assert (now - weight).abs().max() < 0.01 * weight.abs().max()
    assert all(value.abs().max() > 0 for value in gradients(model).values())


def test_bases_of_the_base_weights_are_of_the_dequantised_ones(folders, kind):
    base = load(folders["base"], kind)
    weight = base_weight(base.model.layers[0].self_attn.q_proj)
    with pytest.raises(SubspaceError, match=r"q_proj' of the base model is quantised \(Linear.*basis='base-weights'"):
        build_basis(builder="base-weights", base_model=base, target_modules=TARGETS, k=4)
    model = get_peft_model(base, SubspaceConfig(basis="base-weights", k=4, target_modules=TARGETS))
    layer = layers(model)[0]
    kept = layer.subspace_U["default"].T @ weight @ layer.subspace_V["default"].T
    torch.testing.assert_close(kept.diagonal().abs(), torch.linalg.svdvals(weight)[:4], atol=1e-4, rtol=1e-4)


# half of the widest gap between neighbouring values that 4 bits can hold, whose largest is 1
HALF_GAP = {"nf4": 0.153, "nf4-double": 0.153, "fp4": 0.167}


def rounding_bound(kind: str, weight: torch.Tensor) -> torch.Tensor:
    """How far at most requantising moves each number of `weight`."""
    if kind == "8bit":
        # half a step of the row's 127, and float16 before
        return weight.abs().amax(1, keepdim=True) * (0.5 / 127 + 2**-10)
    blocks = weight.reshape(-1, 64).abs().amax(1, keepdim=True)
    # scales that are quantised themselves, over a layer's 256, are off by a part of the largest
    slack = 0.02 * blocks.max() if kind == "nf4-double" else 1e-6
    return (blocks * HALF_GAP[kind] + slack).expand(-1, 64).reshape(weight.shape)


@pytest.mark.parametrize("own", [0, 2])
def test_merging_rounds_within_bounds_and_unmerging_is_exact(folders, tmp_path, kind, own):
    model = adapted(folders, load(folders["base"], kind), extra_rank=own)
    model.save_pretrained(tmp_path / "task")
    before = logits(model)
    with model.disable_adapter():
        effect = (logits(model) - before).norm()
    wanted = [base_weight(layer) + layer.get_delta_weight("default") for layer in layers(model)]
    stored = [layer.get_base_layer().weight.data.clone() for layer in layers(model)]
    for _ in range(2):
        model.merge_adapter()
        for layer, weight in zip(layers(model), wanted, strict=True):
            assert ((base_weight(layer) - weight).abs() <= rounding_bound(kind, weight)).all()
        merged = logits(model)
        # measured: 1 % of the adapter's effect with 8 bits, 12 % to 14 % with 4
        assert (merged - before).norm() < (0.03 if kind == "8bit" else 0.2) * effect
        model.unmerge_adapter()
        assert torch.equal(logits(model), before)
        for layer, data in zip(layers(model), stored, strict=True):
            assert torch.equal(layer.get_base_layer().weight.data, data)
    unloaded = PeftModel.from_pretrained(load(folders["base"], kind), tmp_path / "task").merge_and_unload(
        safe_merge=True
    )
    assert type(unloaded) is LlamaForCausalLM and not layers(unloaded)
    assert torch.equal(logits(unloaded), merged)


@pytest.mark.parametrize("kind", ["nf4", "nf4-double"])
def test_merging_where_the_faster_layout_was_asked_for(folders, kind):
    """As the documentation has it for a model that only generates."""
    model = adapted(folders, load(folders["base"], kind))
    wanted = [base_weight(layer) + layer.get_delta_weight("default") for layer in layers(model)]
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = bitsandbytes.functional.has_avx512bf16()
    before = logits(model)
    model.merge_adapter()
    for layer, weight in zip(layers(model), wanted, strict=True):
        assert ((base_weight(layer) - weight).abs() <= 1.05 * rounding_bound(kind, weight)).all()
    logits(model)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), before, atol=0.01, rtol=0.01)


def test_two_merged_adapters_and_a_disabled_one_leave_the_base_as_it_was(folders, kind):
    model = adapted(folders, load(folders["base"], kind))
    with model.disable_adapter():
        base = logits(model)
    model.add_adapter("more", SubspaceConfig(basis=str(folders["basis"]), coefficients="diagonal"))
    randomise(model, std=0.01)
    model.merge_adapter(["default", "more"])
    assert all(layer.merged_adapters == ["default", "more"] for layer in layers(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


def test_a_task_fits_its_base_quantised_or_not_and_no_other(folders, tmp_path, kind):
    model = adapted(folders, load(folders["base"], None))
    model.save_pretrained(tmp_path / "plain")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        quantised_model = PeftModel.from_pretrained(load(folders["base"], kind), tmp_path / "plain")
    assert (logits(quantised_model) - logits(model)).abs().max() < 0.3
    quantised_model.save_pretrained(tmp_path / "task")
    PeftModel.from_pretrained(load(folders["base"], None), tmp_path / "task")
    with pytest.raises(BasisMismatchError, match="not those that the task was trained on"):
        PeftModel.from_pretrained(load(folders["other"], kind), tmp_path / "task")


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("kind", ["8bit", "nf4-double"])
def test_the_trainer_trains_as_qlora_does(folders, tmp_path, kind, bf16):
    """With evaluations in between, gradient checkpointing, and a last checkpoint that loads."""
    torch.manual_seed(0)
    base = prepare_model_for_kbit_training(
        load(folders["base"], kind), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model = get_peft_model(base, SubspaceConfig(basis=str(folders["basis"]), task_type="CAUSAL_LM"))
    assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {"subspace_coef"}
    rows = [{"input_ids": row, "labels": row} for row in X]
    settings = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=8,
        per_device_train_batch_size=3,
        learning_rate=2e-3,
        save_steps=8,
        eval_strategy="steps",
        eval_steps=2,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        bf16=bf16,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    trainer = Trainer(model=model, args=settings, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.05
    checkpoint = tmp_path / "out" / "checkpoint-8"
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < 4096
    again = PeftModel.from_pretrained(
        prepare_model_for_kbit_training(load(folders["base"], kind), use_gradient_checkpointing=False), checkpoint
    ).eval()
    # the Trainer has wrapped the trained one's forward in its autocast
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        torch.testing.assert_close(logits(again).float(), logits(model.eval()).float())


class ComputesOnly(nn.Module):
    """As the layers of GPTQ or AWQ: no `nn.Linear`, and a weight that nobody can read."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.qweight = nn.Buffer(layer.weight.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.qweight.T


def test_kinds_that_only_compute_are_trained_and_say_why_they_cannot_be_merged(folders, tmp_path, monkeypatch):
    def resolve(layer: nn.Module, **kwargs: object) -> ForwardOnlyQuantizationBackend | None:
        return ForwardOnlyQuantizationBackend("gptq") if isinstance(layer, ComputesOnly) else None

    monkeypatch.setattr(targets, "resolve_quantization_backend", resolve)
    monkeypatch.setattr("subspace_peft.tuner.layer.resolve_quantization_backend", resolve)

    def base() -> nn.Module:
        model = llama()
        for block in model.model.layers:
            block.self_attn.q_proj = ComputesOnly(block.self_attn.q_proj)
        return model

    config = SubspaceConfig(basis=str(folders["basis"]), target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = randomise(get_peft_model(base(), config), std=0.01).eval()
    assert all(value.abs().max() > 0 for value in gradients(model).values())
    model.eval().save_pretrained(tmp_path / "task")
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path / "task")), logits(model))
    with pytest.raises(SubspaceError, match=r"layers\.0\.self_attn\.q_proj.*gptq.*unquantised"):
        model.merge_adapter()
    with pytest.raises(SubspaceError, match=r"q_proj.*ComputesOnly.*unquantised"):
        get_peft_model(base(), SubspaceConfig(basis="base-weights", k=4, target_modules=["q_proj"]))
