"""A task as a recipe trains on it."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from subspace_peft.errors import SubspaceError

from .data import local_splits, local_tasks
from .jackknife import kept_without


@dataclass(kw_only=True)
class Task:
    """A task's splits.

    Attributes:
        name: short name, or Hub id.
        splits: ``train``, ``validation``, ``test``, and further ones whose names begin with ``test``.
        collate: makes a batch of rows for the Trainer.
        content: sha256 of what the splits hold, where their rows do not show it.
        score_name: what the test score is, as a table calls it.
    """

    name: str
    splits: dict[str, Any] = field(default_factory=dict)
    collate: Any = None
    content: str | None = None
    score_name: str = "score"

    @property
    def validation_name(self) -> str:
        """What the validation score is, as an axis calls it."""
        return self.score_name

    def fingerprint(self) -> str:
        """Return `content`, else the sha256 of the splits' rows, as they are now."""
        if self.content is not None:
            return self.content
        total = hashlib.sha256()
        for name, rows in sorted(self.splits.items()):
            total.update(f"{name}\0{len(rows)}\0".encode())
            # part by part: GLUE's larger sets are too many rows for one text
            for part in rows.iter(batch_size=1000):
                total.update(json.dumps(part, sort_keys=True, default=str).encode())
        return total.hexdigest()


@dataclass(kw_only=True)
class InstructionTask(Task):
    """A task whose answers are texts, see `common.answers`; learning rates are chosen by the loss."""

    @property
    def validation_name(self) -> str:
        """As `Task`'s."""
        return "score: minus the loss per answer token"

    def validations_without(self, trainer: Any) -> list[float]:
        """Return the validation score without each fold of the examples in turn, see `kept_without`."""
        rows, model = self.splits["validation"], trainer.model.eval()
        losses, counts = np.zeros(len(rows)), np.zeros(len(rows))
        for place, row in enumerate(rows):
            batch = trainer.data_collator([row])
            batch = {name: value.to(trainer.args.device) for name, value in batch.items()}
            with torch.no_grad(), trainer.compute_loss_context_manager():
                mean = float(model(**batch).loss)
            counts[place] = int((batch["labels"] != -100).sum())
            losses[place] = mean * counts[place]
        return [-float(losses[kept].sum() / counts[kept].sum()) for kept in kept_without(len(rows))]


@dataclass(kw_only=True)
class LabelledTask(Task):
    """A task with classes or numbers as labels, and its metric.

    Attributes:
        keys: columns of its inputs.
        classes: how many; None where a number is predicted.
        metric: configuration of the GLUE metric that measures it, such as ``mrpc`` (accuracy and F1) or ``stsb``
            (correlations). Its first number is the score.
    """

    keys: list[str]
    classes: int | None
    metric: str

    def __post_init__(self) -> None:
        self.score_name = {"cola": "Matthews correlation", "stsb": "Pearson correlation"}.get(self.metric, "accuracy")

    @classmethod
    def local(cls, data_dir: str | Path, name: str) -> LabelledTask:
        """Read the task from a local folder.

        Raises:
            SubspaceError: as `local_tasks` and `local_splits`; its task.json lacks ``keys``, ``labels`` or ``metric``.
        """
        facts = local_tasks(data_dir)[name]
        if lacking := [key for key in ("keys", "labels", "metric") if key not in facts]:
            raise SubspaceError(f"{Path(data_dir, 'data', name, 'task.json')} lacks {', '.join(lacking)}.")
        # what GLUE's metrics compute depends on the task only through the kind of its score
        like = {"accuracy": "sst2", "accuracy_f1": "mrpc", "matthews_correlation": "cola", "pearson_spearman": "stsb"}
        classes = None if facts["labels"] is None else len(facts["labels"])
        metric = like.get(facts["metric"], facts["metric"])
        return cls(name=name, keys=facts["keys"], classes=classes, metric=metric, splits=local_splits(data_dir, name))

    def measure(self, prediction: Any) -> dict[str, float]:
        """Return the metric of a `transformers.EvalPrediction`: ``score`` and every number by its own name.

        ``score`` is NaN, and alone, where the model's outputs are not finite: an argmax over them would hide it.
        """
        logits = prediction.predictions
        if not np.isfinite(logits).all():
            return {"score": math.nan}
        guesses = logits.squeeze(-1) if self.classes is None else logits.argmax(-1)
        numbers = _metric(self.metric).compute(predictions=guesses, references=prediction.label_ids)
        numbers = {key: float(value) for key, value in numbers.items()}
        return {"score": next(iter(numbers.values())), **numbers}

    def validations_without(self, trainer: Any) -> list[float]:
        """Return the validation score without each fold of the examples in turn, see `kept_without`."""
        found = trainer.predict(self.splits["validation"])
        parts = [(found.predictions[kept], found.label_ids[kept]) for kept in kept_without(len(found.label_ids))]
        return [self.measure(EvalPrediction(*part))["score"] for part in parts]

    def test(self, trainer: Any) -> dict[str, Any]:
        """Predict every test split by a `transformers.Trainer` and measure it.

        Returns:
            ``metrics``, by split; ``test``, the score of the first one.
        """
        tests = {name: rows for name, rows in self.splits.items() if name.startswith("test")}
        metrics = {name: self.measure(trainer.predict(rows)) for name, rows in tests.items()}
        return {"test": metrics["test"]["score"], "metrics": metrics}


_metrics: dict[str, Any] = {}


def _metric(config: str) -> Any:
    # loading asks the Hub where it is in reach: once, not at every evaluation
    if config not in _metrics:
        from .metrics import load_metric

        _metrics[config] = load_metric("glue", config)
    return _metrics[config]
