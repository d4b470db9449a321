"""What users do with LoRA, done with a task in a basis: the stock Trainer, AutoPeftModel, transformers' own adapter calls."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForSequenceClassification,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from subspace_peft import SubspaceConfig, export_lora

from .conftest import bert, inputs, needs_transformers_adapters, randomise


def logits(model):
    with torch.no_grad():
        return model.eval()(inputs()).logits


@pytest.fixture
def base_folder(tmp_path) -> Path:
    bert().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def train(base_folder: Path, basis_folder: Path, out: Path, steps: int, resume: Path | None = None, **arguments):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base_folder)
    model = get_peft_model(model, SubspaceConfig(basis=str(basis_folder), task_type="SEQ_CLS"))
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": torch.randint(0, 100, (7,), generator=generator), "labels": torch.tensor(i % 2)}
        for i in range(64)
    ]
    settings = TrainingArguments(
        output_dir=str(out), max_steps=steps, save_steps=4, per_device_train_batch_size=8, learning_rate=1e-2, seed=1,
        lr_scheduler_type="constant", report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        **arguments,
    )  # fmt: skip
    Trainer(model=model, args=settings, train_dataset=rows).train(resume_from_checkpoint=resume and str(resume))
    return model


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_the_trainer_resumes_bit_equal_from_a_kilobyte_checkpoint(base_folder, basis_folder, tmp_path):
    whole = trained(train(base_folder, basis_folder, tmp_path / "one", 8))
    checkpoint = tmp_path / "one" / "checkpoint-4"
    resumed = trained(train(base_folder, basis_folder, tmp_path / "two", 8, resume=checkpoint))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(value.abs().max() > 1e-3 for name, value in whole.items() if "subspace_coef" in name)
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < 4096


def test_gradient_checkpointing_changes_nothing(base_folder, basis_folder, tmp_path):
    plain = trained(train(base_folder, basis_folder, tmp_path / "one", 3))
    saving = trained(train(base_folder, basis_folder, tmp_path / "two", 3, gradient_checkpointing=True))
    for name in plain:
        torch.testing.assert_close(plain[name], saving[name], atol=1e-6, rtol=1e-5)


def test_load_best_model_at_end(base_folder, basis_folder, tmp_path):
    rows = [{"input_ids": torch.randint(0, 100, (7,)), "labels": torch.tensor(i % 2)} for i in range(16)]
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(base_folder), SubspaceConfig(basis=str(basis_folder))
    )
    settings = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=4, save_steps=1, eval_steps=1, eval_strategy="steps", report_to=[],
        load_best_model_at_end=True, learning_rate=0.5, disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=settings, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    scores = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(scores), rel=1e-6)


@pytest.fixture
def task(base_folder, basis_folder, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(base_folder)
    model = randomise(get_peft_model(model, SubspaceConfig(basis=str(basis_folder), task_type="SEQ_CLS")))
    model.save_pretrained(tmp_path / "task")
    return model, tmp_path / "task"


def test_auto_classes_and_low_memory_loading(task):
    model, folder = task
    assert torch.equal(logits(AutoPeftModelForSequenceClassification.from_pretrained(folder)), logits(model))
    model.load_adapter(folder, "again", low_cpu_mem_usage=True)
    expected = logits(model)
    model.set_adapter("again")
    assert torch.equal(logits(model), expected)


def test_copies_and_pickles(task):
    model, _ = task
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(logits(other), logits(model))
        other.add_adapter("more", SubspaceConfig(basis=model.peft_config["default"].basis, coefficients="factor"))
        other.set_adapter("more")
        assert not torch.equal(logits(other), logits(model))


def test_state_dicts_and_direct_injection(task, basis_folder, base_folder):
    model, _ = task
    # the classifier was not trained, and PEFT reads modules_to_save on wrapped models only
    state = {key: value for key, value in get_peft_model_state_dict(model).items() if "classifier" not in key}
    config = SubspaceConfig(basis=str(basis_folder))
    plain = AutoModelForSequenceClassification.from_pretrained(base_folder)
    injected = inject_adapter_in_model(config, plain)
    assert set_peft_model_state_dict(injected, state).unexpected_keys == []
    assert torch.equal(logits(injected), logits(model))


@needs_transformers_adapters
def test_transformers_own_adapter_calls(base_folder, basis_folder, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(base_folder)
    before = logits(model)
    model.add_adapter(SubspaceConfig(basis=str(basis_folder)), "task")
    randomise(model)
    model.save_pretrained(tmp_path / "native")
    other = AutoModelForSequenceClassification.from_pretrained(base_folder)
    other.load_adapter(str(tmp_path / "native"))
    assert torch.equal(logits(other), logits(model))
    assert not torch.equal(logits(model), before)
    model.disable_adapters()
    assert torch.equal(logits(model), before)
    model.delete_adapter("task")


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q_proj|down_proj)"])
def test_a_decoder_trains_generates_and_exports(targets, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=99
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    model = get_peft_model(
        copy.deepcopy(base), SubspaceConfig(basis="random", k=4, target_modules=targets, task_type="CAUSAL_LM")
    )
    model = randomise(model).eval()
    x = torch.randint(1, 99, (2, 5))
    assert model.generate(input_ids=x, max_new_tokens=3, do_sample=False).shape == (2, 8)
    model.save_pretrained(tmp_path / "task")
    export_lora(tmp_path / "task", tmp_path / "lora")
    for folder in ("task", "lora"):
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder).eval()
        with torch.no_grad():
            torch.testing.assert_close(again(x).logits, model(x).logits, atol=1e-5, rtol=1e-4)
