"""What users do with LoRA, done with a task in a basis: the stock Trainer, AutoPeftModel, transformers' own adapter
calls."""

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
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from subspace_peft import SubspaceConfig, export_lora

from .models import basis_storage, bert, inputs, needs_transformers_adapters, randomise


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
        output_dir=str(out),
        max_steps=steps,
        save_steps=4,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        seed=1,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **arguments,
    )
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


def test_load_best_model_at_end_restores_the_best_coefficients(base_folder, basis_folder, tmp_path):
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 100, (7,), generator=generator) for _ in range(16)]
    rows = [{"input_ids": text, "labels": torch.tensor(i % 2)} for i, text in enumerate(texts)]
    # the better the one is learned, the worse the other: the last step is not the best one
    opposite = [{**row, "labels": 1 - row["labels"]} for row in rows]
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(base_folder), SubspaceConfig(basis=str(basis_folder))
    )
    settings = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=6,
        save_steps=1,
        eval_steps=1,
        eval_strategy="steps",
        report_to=[],
        load_best_model_at_end=True,
        learning_rate=1e-2,
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    seen = {}

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            seen[state.global_step] = (metrics["eval_loss"], trained(model))

    trainer = Trainer(model=model, args=settings, train_dataset=rows, eval_dataset=opposite, callbacks=[Watch()])
    trainer.train()
    best = min(seen, key=lambda step: seen[step][0])
    assert best < 6 and trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    now = trained(model)
    assert all(torch.equal(now[name], value) for name, value in seen[best][1].items())
    assert not all(torch.equal(now[name], value) for name, value in seen[6][1].items())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(seen[best][0], rel=1e-6)


@pytest.mark.slow
def test_auto_find_batch_size_goes_on_with_a_smaller_batch(base_folder, basis_folder, tmp_path):
    """Out of memory after the backward pass of a batch of 5, gradients there: the next size trains as if begun with
    it."""

    class Cramped(Trainer):
        def training_step(self, model, inputs, *args):
            tried.append(len(inputs["labels"]))
            loss = super().training_step(model, inputs, *args)
            if tried[-1] > 4:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return loss

    def run(make: type[Trainer], batch: int, name: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        # the batch that does not fit draws random numbers, too
        model = AutoModelForSequenceClassification.from_pretrained(
            base_folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        model = get_peft_model(model, SubspaceConfig(basis=str(basis_folder), task_type="SEQ_CLS"))
        settings = TrainingArguments(
            output_dir=str(tmp_path / name),
            max_steps=3,
            per_device_train_batch_size=batch,
            learning_rate=1e-2,
            seed=1,
            auto_find_batch_size=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        rows = [{"input_ids": torch.arange(7) + i, "labels": torch.tensor(i % 2)} for i in range(32)]
        trainer = make(model=model, args=settings, train_dataset=rows)
        trainer.train()
        assert trainer.state.global_step == 3
        return trained(model)

    tried: list[int] = []
    found = run(Cramped, 5, "cramped")
    assert tried == [5, 4, 4, 4]
    assert any(value.abs().max() > 1e-3 for name, value in found.items() if "subspace_coef" in name)
    whole = run(Trainer, 4, "whole")
    assert all(torch.equal(whole[name], value) for name, value in found.items())


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


def test_a_second_adapter_of_a_self_contained_tasks_configuration_has_its_basis(base_folder, tmp_path):
    """TRL makes the reference of a loaded task so: its configuration again, and then a copy of its parameters."""
    config = SubspaceConfig(basis="random", k=4, target_modules=["query", "value"])
    model = randomise(get_peft_model(AutoModelForSequenceClassification.from_pretrained(base_folder), config))
    model.save_pretrained(tmp_path / "task")
    model = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base_folder), tmp_path / "task"
    )
    expected, storage = logits(model), basis_storage(model)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in list(model.named_parameters()):
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected) and basis_storage(model) == storage
    # a copy on disk is one of a task of its own
    model.save_pretrained(tmp_path / "both")
    model.delete_adapter("default")
    assert torch.equal(logits(model), expected)
    again = AutoModelForSequenceClassification.from_pretrained(base_folder)
    assert torch.equal(logits(PeftModel.from_pretrained(again, tmp_path / "both" / "ref")), expected)


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


@needs_transformers_adapters
def test_two_adapters_by_transformers_own_calls(base_folder, basis_folder, tmp_path):
    def plain():
        return AutoModelForSequenceClassification.from_pretrained(base_folder)

    expected = {}
    for seed, name in enumerate(("one", "two"), start=3):
        model = plain()
        model.add_adapter(SubspaceConfig(basis=str(basis_folder)), name)
        randomise(model, seed=seed).save_pretrained(tmp_path / name)
        expected[name] = logits(model)
    model = plain()
    base = logits(model)
    for name in expected:
        model.load_adapter(str(tmp_path / name), adapter_name=name)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "subspace" in n)
    storage = basis_storage(model)
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        assert model.active_adapters() == [name] and torch.equal(logits(model), expected[name])
    model.delete_adapter("two")
    assert list(model.peft_config) == ["one"] and basis_storage(model) == storage
    model.enable_adapters()
    assert torch.equal(logits(model), expected["one"])
    with pytest.raises(ValueError, match="two"):
        model.set_adapter("two")
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")), expected["one"])
    model.disable_adapters()
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q_proj|down_proj)"])
def test_a_decoder_trains_generates_and_exports(targets, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
    )
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
