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
# the same, recorded where they are not as usual
SELDOM = {"dataloader_drop_last": False, "group_by_length": False, "train_sampling_strategy": "random"}
SELDOM |= {"warmup_ratio": 0.0, "auto_find_batch_size": False}


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
    seldom = [name for name, usual in SELDOM.items() if values.get(name) not in (None, usual)]
    return {name: values[name] for name in (*RECORDED, *seldom) if name in values}


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


def check_judged(task: str, args: TrainingArguments, validation: Any) -> None:
    """Check that a training that is to be judged on the way has data for it.

    Args:
        task: the task's name.
        args: of its training.
        validation: its validation data, or None.

    Raises:
        SubspaceError: it has none.
    """
    if validation is None and args.eval_strategy != "no":
        raise SubspaceError(
            f"Task {task!r}: its training is to be judged on the way (eval_strategy={args.eval_strategy.value!r}), and"
            " the data for the scores decide nothing. Give validation_dataset= (in a plan: `validation:`), or leave"
            " eval_strategy out."
        )
