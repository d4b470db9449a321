"""A stock Trainer's run: the rates of its parameters, and its scores, curve and seconds."""

from __future__ import annotations

import time
from typing import Any

from torch import nn


def trained_parameters(model: nn.Module, head: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the trained parameters of the adapter, and those of the modules called `head`."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [p for name, p in trained if head not in name], [p for name, p in trained if head in name]


def parameter_groups(model: nn.Module, head: str, rate: float, head_rate: float) -> list[dict[str, Any]]:
    """Return the optimizer's groups: the adapter at `rate`, the modules called `head` at `head_rate`.

    Where nothing but the head is trained, its rate is `rate`.
    """
    adapter, top = trained_parameters(model, head)
    groups = [{"params": adapter, "lr": rate}, {"params": top, "lr": head_rate if adapter else rate}]
    return [group for group in groups if group["params"]]


def fit(trainer: Any, resume: str | None = None) -> dict[str, Any]:
    """Train by a `transformers.Trainer` that evaluates every epoch; with no epochs, evaluate alone.

    Args:
        trainer: with a metric called ``score``, or without any.
        resume: the checkpoint to go on from.

    Returns:
        ``validation``, the last validation score: what the Trainer's `compute_metrics` calls ``score``, or minus the
        loss without it; ``curve``, pairs of step and validation score; ``seconds`` of training since `resume`,
        evaluations left out.
    """
    if not trainer.args.num_train_epochs:
        numbers = trainer.evaluate()
        return {"validation": _score(numbers), "curve": [[0, _score(numbers)]], "seconds": 0.0}
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    seconds = time.perf_counter() - began
    logs = [entry for entry in trainer.state.log_history if "eval_runtime" in entry]
    before = int(resume.rpartition("-")[2]) if resume else 0
    seconds -= sum(entry["eval_runtime"] for entry in logs if entry["step"] > before)
    curve = [[entry["step"], _score(entry)] for entry in logs]
    return {"validation": curve[-1][1], "curve": curve, "seconds": seconds}


def _score(numbers: dict[str, float]) -> float:
    return numbers["eval_score"] if "eval_score" in numbers else -numbers["eval_loss"]
