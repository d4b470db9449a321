"""TRL's trainers, with nothing but `peft_config=SubspaceConfig(...)` told to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from subspace_peft import SubspaceConfig, build_basis

from .models import basis_storage, randomise

trl = pytest.importorskip("trl", reason="tests of TRL's trainers; trl is not installed")

WORDS = ["<unk>", "<pad>", "<s>", "</s>", "say", "the", "first", "red", "cat", "dog", "bird", "sad", "river"]
TARGETS = ["q_proj", "v_proj"]
PLAIN = {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "max_length": 32, "seed": 1}


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(WORDS),
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def basis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = build_basis(builder="base-weights", base_model=base(), target_modules=TARGETS, k=4)
    return built.save_pretrained(tmp_path_factory.mktemp("basis"))


def config(basis: Path | str, **more: Any) -> SubspaceConfig:
    return SubspaceConfig(basis=str(basis), target_modules=TARGETS, task_type="CAUSAL_LM", **more)


def questions(**answers: str) -> Dataset:
    """Two questions, four times each; `answers`: column → which of a question's words, first or last."""
    rows = []
    for words in ("red cat", "dog bird sad"):
        first, last = words.split()[0], words.split()[-1]
        rows.append(
            {
                "prompt": f"say the first {words}",
                **{k: f" {first if v == 'first' else last}" for k, v in answers.items()},
            }
        )
    return Dataset.from_list(rows * 4)


X = torch.tensor([[4, 5, 6, 7, 8], [4, 5, 6, 9, 10]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(X).logits


def frozen(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "subspace_" not in name}


def test_sft_trains_only_coefficients_and_saves_kilobytes(basis, tmp_path):
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=12,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        save_steps=12,
        logging_steps=1,
        completion_only_loss=True,
        **PLAIN,
    )
    trainer = trl.SFTTrainer(
        base(),
        args=settings,
        train_dataset=questions(completion="first"),
        processing_class=tokenizer(),
        peft_config=config(basis),
    )
    before = frozen(trainer.model)
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert len(trained) == 4 and all(".subspace_coef.default." in name for name in trained)
    trainer.train()
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == 4
    assert all(torch.equal(before[name], value) for name, value in frozen(trainer.model).items())
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    trainer.save_model(str(tmp_path / "task"))
    for folder in (tmp_path / "task", tmp_path / "out" / "checkpoint-12"):
        # 4 modules of 4 × 4 numbers
        assert (folder / "adapter_model.safetensors").stat().st_size < 1024
        assert torch.equal(logits(PeftModel.from_pretrained(base(), folder)), logits(trainer.model))


def dpo(model: torch.nn.Module, out: Path, **more: Any) -> Any:
    settings = trl.DPOConfig(
        output_dir=str(out),
        max_steps=8,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        save_strategy="no",
        **PLAIN,
    )
    pairs = questions(chosen="first", rejected="last")
    return trl.DPOTrainer(model, args=settings, train_dataset=pairs, processing_class=tokenizer(), **more)


def log_probs(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Of each answer, computed by hand: chosen ones, rejected ones."""
    with torch.no_grad():
        scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    each = scores.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return (each * batch["completion_mask"][:, 1:]).sum(1).chunk(2)


def assert_reference(trainer: Any, batch: dict[str, torch.Tensor], expected: tuple[torch.Tensor, ...]) -> None:
    for found, wanted in zip(trainer.compute_ref_log_probs(trainer.model, batch), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_dpo_of_a_new_adapter_has_the_base_model_as_its_reference(basis, tmp_path):
    trainer = dpo(base(), tmp_path, peft_config=config(basis))
    batch = next(iter(trainer.get_train_dataloader()))
    expected = log_probs(base(), batch)
    assert_reference(trainer, batch, expected)
    trainer.train()
    assert list(trainer.model.peft_config) == ["default"] and trainer.ref_model is None
    assert_reference(trainer, batch, expected)
    chosen, rejected = log_probs(trainer.model.eval(), batch)
    assert ((chosen - rejected) - (expected[0] - expected[1])).min() > 0.1


@pytest.mark.parametrize(
    "own", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["basis-elsewhere", "basis-in-the-task"]
)
def test_dpo_of_a_loaded_task_has_its_own_start_as_its_reference(basis, tmp_path, own):
    task = randomise(get_peft_model(base(), config("random", k=4) if own else config(basis)), std=0.02).eval()
    task.save_pretrained(tmp_path / "task")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "task", is_trainable=True)
    storage = basis_storage(loaded)
    trainer = dpo(loaded, tmp_path / "out")
    batch = next(iter(trainer.get_train_dataloader()))
    expected = log_probs(task, batch)
    assert (expected[0] - log_probs(base(), batch)[0]).abs().max() > 0.05
    assert_reference(trainer, batch, expected)
    trainer.train()
    # TRL has added a copy of the task by the name of ref: its basis is the very same
    assert list(trainer.model.peft_config) == ["default", "ref"] and basis_storage(trainer.model) == storage
    assert_reference(trainer, batch, expected)
    chosen, rejected = log_probs(trainer.model.eval(), batch)
    assert ((chosen - rejected) - (expected[0] - expected[1])).min() > 0.1
