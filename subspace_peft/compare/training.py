"""What recipes that train a head beside an adapter have in common: knobs, learning rates, and reading a finished training."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

from torch import nn

from .knobs import SubspaceKnobs, knob
from .task import LabelledTask


@dataclasses.dataclass
class TrainingKnobs(SubspaceKnobs):
    """Budgets and the optimizer's settings."""

    source_examples: int = knob(10000, "at most so many training examples per source; 0: all")
    source_epochs: float = knob(5, "passes over them")
    source_rate: float = knob(5e-4, "learning rate of the source adapters")
    train_examples: int = knob(0, "training examples, drawn by the seed; 0: all")
    validation_examples: int = knob(400, "validation examples")
    test_examples: int = knob(0, "test examples; 0: all")
    epochs: float = knob(20, "passes over the training examples")
    batch: int = knob(16, "examples per step")
    rate: float = knob(4e-3, "learning rate of --stage train; compare sweeps its own")
    head_rate: float = knob(1e-3, "learning rate of the head beside an adapter")
    scheduler: str = knob("linear", "as TrainingArguments.lr_scheduler_type")
    warmup: float = knob(0.06, "share of the steps")
    weight_decay: float = knob(0.0, "of AdamW")
    bf16: bool = knob(False, "train in bfloat16")


def parameter_groups(model: nn.Module, head: str, rate: float, head_rate: float) -> list[dict[str, Any]]:
    """What is trained, for the optimizer: the adapter at `rate`, the modules called `head` at `head_rate`; where nothing but the
    head is trained, that at `rate`.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    top, rest = [p for name, p in trained if head in name], [p for name, p in trained if head not in name]
    groups = [{"params": rest, "lr": rate}, {"params": top, "lr": head_rate if rest else rate}]
    return [group for group in groups if group["params"]]


def fit(trainer: Any, task: LabelledTask, resume: str | None = None) -> dict[str, Any]:
    """Train, by a `transformers.Trainer` that evaluates every epoch with `task.measure`.

    Returns:
        ``validation`` and ``test``, the scores at the end; ``metrics`` of the test splits; ``curve``, pairs of step and validation
        score; ``seconds`` of training (since the checkpoint `resume`), evaluations left out.
    """
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    seconds = time.perf_counter() - began
    logs = [entry for entry in trainer.state.log_history if "eval_score" in entry]
    before = int(resume.rpartition("-")[2]) if resume else 0
    seconds -= sum(entry["eval_runtime"] for entry in logs if entry["step"] > before)
    curve, metrics = [[entry["step"], entry["eval_score"]] for entry in logs], task.test(trainer)
    scores = {"validation": curve[-1][1], "test": metrics["test"]["score"]}
    return {**scores, "metrics": metrics, "curve": curve, "seconds": seconds}


def planned_steps(knobs: TrainingKnobs, known: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Optimizer steps of each stage, as far as `known`, task → ``train`` (its number of training examples, or None), says."""
    from .planned import runs_of, steps_of

    budgets = {
        f"source {name}": (name, knobs.source_examples, knobs.source_epochs)
        for name in knobs.sources
        if "/" not in name
    }
    budgets["train"] = (knobs.task, knobs.train_examples, knobs.epochs)
    steps = {}
    for stage, (name, most, epochs) in budgets.items():
        if count := min(known[name]["train"] or most, most or math.inf):
            steps[stage] = steps_of(count, knobs.batch, epochs)
    return steps | ({"compare": steps["train"] * runs_of(knobs)} if "train" in steps else {})


def planned_fetches(knobs: Any, data: str | None) -> list[str]:
    """What of model, `data` (None: local), adapters and basis is not on this machine."""
    from pathlib import Path

    wanted = [("model", knobs.model), *([("data", data)] if data else [])]
    wanted += [("adapter", name) for name in knobs.sources if "/" in name]
    wanted += [("basis", knobs.basis)] if knobs.basis else []
    return [f"{kind} {name}" for kind, name in wanted if not Path(name).is_dir()]
