"""The demo's model, data and Trainer, under one budget for every row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common as shared
import torch
import transformers
from common import Task
from offline.texts import TextTask
from transformers import AutoModel, AutoTokenizer, Trainer, TrainingArguments

from subspace_peft import modeling

HEAD = "classifier"
HEAD_RATE = 5e-3  # of the classifier, the same in every row that trains an adapter


@dataclass(frozen=True)
class Sizes:
    """The budget of every training: examples of each split, passes, examples per step, longest input."""

    train: int = 256
    validation: int = 160
    test: int = 600
    epochs: int = 4
    batch: int = 16
    tokens: int = 32

    @property
    def splits(self) -> dict[str, int]:
        """Split → so many examples."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


QUICK = Sizes(train=48, validation=32, test=48, epochs=1)


def make_model(encoder: str | Path, classes: int, seed: int) -> modeling.MeanPooledClassifier:
    """Load the encoder under a head for so many classes, drawn by `seed`.

    Dropout is off: the runs are too short to need it, and attention without it takes two thirds of the time on a CPU.
    """
    torch.manual_seed(seed)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    given = {"num_labels": classes, "add_pooling_layer": False, "dtype": torch.float32, **no_dropout}
    model = modeling.MeanPooledClassifier(AutoModel.from_pretrained(str(encoder), **given))
    with torch.no_grad():
        model.classifier.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(seed))
    return model


def load_task(task: TextTask, encoder: str | Path, sizes: Sizes, seed: int) -> Task:
    """Split and tokenise a task."""
    tokenizer = AutoTokenizer.from_pretrained(str(encoder))

    def encode(rows: dict[str, list[str]]) -> Any:
        return tokenizer(rows["text"], truncation=True, max_length=sizes.tokens)

    splits = task.split(sizes.splits, seed)
    return Task(
        name=task.name,
        splits={name: rows.map(encode, batched=True, remove_columns=["text"]) for name, rows in splits.items()},
        collate=transformers.DataCollatorWithPadding(tokenizer),
        score_name="accuracy",
    )


def make_trainer(model: torch.nn.Module, task: Task, sizes: Sizes, rate: float, seed: int, out: Path) -> Trainer:
    """Make the stock Trainer: AdamW without weight decay, linear decay, dynamic padding."""
    arguments = TrainingArguments(
        output_dir=str(out),
        num_train_epochs=sizes.epochs,
        per_device_train_batch_size=sizes.batch,
        per_device_eval_batch_size=4 * sizes.batch,
        train_sampling_strategy="group_by_length",
        lr_scheduler_type="linear",
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
    )
    groups = shared.parameter_groups(model, HEAD, rate, HEAD_RATE)
    trainer = Trainer(
        model,
        arguments,
        task.collate,
        train_dataset=task.splits["train"],
        eval_dataset=task.splits["validation"],
        compute_metrics=lambda prediction: {"score": accuracy(prediction)},
        optimizers=(torch.optim.AdamW(groups, weight_decay=0.0), None),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def accuracy(prediction: Any) -> float:
    """Return the share of right guesses of a `transformers.EvalPrediction`."""
    return float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())
