"""One row of the table: a model trained by the stock Trainer, its learning rate chosen on the validation split."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments

HEAD_RATE = 5e-3  # of the classifier, the same in every row that trains an adapter


@dataclass(frozen=True)
class Budget:
    """What every row gets.

    Attributes:
        train, validation, test: examples.
        epochs: passes over the training examples.
        batch: examples per step.
        tokens: longest input.
    """

    train: int = 256
    validation: int = 160
    test: int = 600
    epochs: int = 4
    batch: int = 16
    tokens: int = 32

    def sizes(self) -> dict[str, int]:
        return {"train": self.train, "validation": self.validation, "test": self.test}


@dataclass
class Run:
    """One training run.

    Attributes:
        rate: learning rate of the adapter (of the head, where nothing else is trained).
        validation: accuracy on the validation split after the last step.
        seconds: of training, evaluations left out.
        curve: (step, accuracy on the validation split).
        model: the trained model.
    """

    rate: float
    validation: float
    seconds: float
    curve: list[tuple[int, float]] = field(default_factory=list)
    model: Any = None


def tokenised(splits: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, budget: Budget) -> dict[str, Any]:
    """The splits with token ids in place of text."""

    def encode(rows: dict[str, list[str]]) -> Any:
        return tokenizer(rows["text"], truncation=True, max_length=budget.tokens)

    return {name: rows.map(encode, batched=True, remove_columns=["text"]) for name, rows in splits.items()}


def train_once(
    model: nn.Module,
    data: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    budget: Budget,
    rate: float,
    seed: int,
) -> Run:
    """Train with the stock Trainer: AdamW without weight decay, linear decay, dynamic padding."""
    head = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" in name]
    rest = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" not in name]
    groups = (
        [{"params": rest, "lr": rate}, {"params": head, "lr": HEAD_RATE}] if rest else [{"params": head, "lr": rate}]
    )
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=budget.epochs,
            per_device_train_batch_size=budget.batch,
            per_device_eval_batch_size=4 * budget.batch,
            train_sampling_strategy="group_by_length",
            learning_rate=rate,
            lr_scheduler_type="linear",
            eval_strategy="epoch",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=seed,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=_accuracy,
            optimizers=(torch.optim.AdamW(groups, weight_decay=0.0), None),
        )
        trainer.remove_callback(PrinterCallback)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    logs = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    seconds -= sum(entry["eval_runtime"] for entry in logs)
    curve = [(entry["step"], entry["eval_accuracy"]) for entry in logs]
    return Run(rate, curve[-1][1], seconds, curve, model)


def train_best(
    make: Callable[[], nn.Module],
    rates: Sequence[float],
    data: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    budget: Budget,
    seed: int,
    tick: Callable[[], Any],
) -> Run:
    """Train once per learning rate, each from the same start, and keep the run with the best validation accuracy."""
    best: Run | None = None
    for rate in rates:
        run = train_once(make(), data, tokenizer, budget, rate, seed)
        tick()
        # ties go to the earlier, smaller rate
        if best is None or run.validation > best.validation:
            best = run
    assert best is not None
    return best


def accuracy(model: nn.Module, rows: Any, tokenizer: PreTrainedTokenizerBase, batch: int = 64) -> float:
    """Share of `rows` that the model labels rightly."""
    return float((predictions(model, rows, tokenizer, batch).argmax(1) == np.asarray(rows["label"])).mean())


def predictions(model: nn.Module, rows: Any, tokenizer: PreTrainedTokenizerBase, batch: int = 64) -> np.ndarray:
    """Logits (rows, labels) in evaluation mode."""
    collate = DataCollatorWithPadding(tokenizer)
    model.eval()
    parts = []
    with torch.no_grad():
        for start in range(0, len(rows), batch):
            chunk = [dict(row) for row in rows.select(range(start, min(start + batch, len(rows))))]
            inputs = collate(chunk)
            inputs.pop("labels", None)
            parts.append(model(**inputs).logits.float().cpu().numpy())
    return np.concatenate(parts)


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}
