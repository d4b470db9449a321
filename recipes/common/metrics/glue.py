"""GLUE's metrics as an `evaluate.Metric`: the keys and numbers of the published one (Wang et al., arXiv
1804.07461)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from subspace_peft.errors import SubspaceError

CORRELATED, PAIRED_F1, MATTHEWS = ("stsb",), ("mrpc", "qqp"), ("cola",)
TASKS = (
    "cola",
    "sst2",
    "mrpc",
    "stsb",
    "qqp",
    "mnli",
    "mnli_mismatched",
    "mnli_matched",
    "qnli",
    "rte",
    "wnli",
    "hans",
)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            'GLUE\'s metrics need scikit-learn and scipy: pip install "subspace-peft[recipes]".'
        ) from error


def check_numbers(metric: str, predictions: Sequence[Any], references: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays. Raises `SubspaceError` where they are empty or of different lengths."""
    if len(predictions) != len(references) or len(predictions) == 0:
        raise SubspaceError(
            f"{metric}: {len(predictions)} predictions for {len(references)} references; give as many of each, at"
            " least one."
        )
    return np.asarray(predictions), np.asarray(references)


class Glue(evaluate.Metric):
    """`config_name` is the task. Labels are integers, STS-B's scores floats.

    `compute` returns Python floats: ``accuracy``; for MRPC and QQP also ``f1``; for CoLA ``matthews_correlation``; for
    STS-B ``pearson`` and ``spearmanr``, NaN where either side is constant.

    Raises:
        SubspaceError: no such task; predictions and references that are empty or of different lengths.
        ImportError: scikit-learn or scipy is missing, where the task needs it.
    """

    def __init__(self, config_name: str | None = None, **kwargs: Any) -> None:
        if config_name not in TASKS:
            raise SubspaceError(f"GLUE has no task {config_name!r}; choose one of {', '.join(TASKS)}.")
        super().__init__(config_name=config_name, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        kind = "float32" if self.config_name in CORRELATED else "int64"
        return evaluate.MetricInfo(
            description="GLUE's metrics",
            citation="arXiv 1804.07461",
            inputs_description="predictions and references: a label each, or a score for stsb",
            features=datasets.Features({"predictions": datasets.Value(kind), "references": datasets.Value(kind)}),
            format="numpy",
        )

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        guesses, truth = check_numbers(f"glue, {self.config_name}", predictions, references)
        if self.config_name in MATTHEWS:
            return {"matthews_correlation": float(_library("sklearn.metrics").matthews_corrcoef(truth, guesses))}
        if self.config_name in CORRELATED:
            if np.ptp(guesses) == 0 or np.ptp(truth) == 0:
                return {"pearson": float("nan"), "spearmanr": float("nan")}
            stats = _library("scipy.stats")
            return {
                "pearson": float(stats.pearsonr(guesses, truth)[0]),
                "spearmanr": float(stats.spearmanr(guesses, truth)[0]),
            }
        result = {"accuracy": float((guesses == truth).mean())}
        if self.config_name in PAIRED_F1:
            result["f1"] = float(_library("sklearn.metrics").f1_score(y_true=truth, y_pred=guesses))
        return result


class Accuracy(evaluate.Metric):
    """Share of predictions that equal their reference; with `config_name="multilabel"` of rows of labels that do.

    Raises:
        SubspaceError: predictions and references that are empty or of different lengths.
    """

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int32")
        kind = datasets.Sequence(label) if self.config_name == "multilabel" else label
        return evaluate.MetricInfo(
            description="accuracy",
            citation="",
            inputs_description="predictions and references: integer labels",
            features=datasets.Features({"predictions": kind, "references": kind}),
        )

    def _compute(
        self,
        predictions: Sequence[Any],
        references: Sequence[Any],
        normalize: bool = True,
        sample_weight: Sequence[float] | None = None,
    ) -> dict[str, float]:
        guesses, truth = check_numbers("accuracy", predictions, references)
        hits = (guesses == truth).reshape(len(truth), -1).all(axis=1)
        weights = np.ones(len(hits)) if sample_weight is None else np.asarray(sample_weight, dtype=float)
        if weights.shape != hits.shape:
            raise SubspaceError(f"accuracy: {len(weights)} weights for {len(hits)} predictions.")
        return {"accuracy": float(weights @ hits) / (float(weights.sum()) if normalize else 1.0)}
