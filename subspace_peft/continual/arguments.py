"""The arguments of trainings: those where none are given, those that decide a result, and their check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..errors import SubspaceError

LEARNING_RATE = 3e-3
# what decides the result of a training; the rest of TrainingArguments is about logs, places and the machine
RECORDED = (
    *("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "lr_scheduler_type"),
    *("lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "bf16", "fp16", "label_smoothing_factor"),
    *("gradient_checkpointing", "load_best_model_at_end", "metric_for_best_model", "neftune_noise_alpha"),
)


def default_arguments(folder: Path) -> TrainingArguments:
    """Return the arguments of a training where none are given: a rate of 3e-3, four epochs, batches of 16."""
    return TrainingArguments(
        str(folder),
        learning_rate=LEARNING_RATE,
        num_train_epochs=4,
        per_device_train_batch_size=16,
        save_strategy="epoch",
        save_total_limit=1,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )


def recorded(args: TrainingArguments) -> dict[str, Any]:
    """Return what decides a training's result, as JSON values."""
    values = args.to_dict()
    return {name: values[name] for name in RECORDED if name in values}


def check_arguments(args: Any) -> TrainingArguments:
    """Check the arguments of trainings.

    Raises:
        SubspaceError: they are of another kind, or would push checkpoints.
    """
    if not isinstance(args, TrainingArguments):
        raise SubspaceError(f"args is a {type(args).__name__}: give TrainingArguments of transformers.")
    if args.push_to_hub:
        raise SubspaceError(
            "args: push_to_hub would push the checkpoints of every training. Leave it out; push_basis_to and"
            " push_tasks_to of the options push versions and tasks."
        )
    return args
