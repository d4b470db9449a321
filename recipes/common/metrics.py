"""The metrics that the recipes report, through `evaluate`: the published ones where the Hub is in reach, else twins.

The twins give the numbers of the published metrics; scikit-learn, scipy and rouge-score do the sums.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import requests  # evaluate's own client, so that the same proxies and certificates count

from subspace_peft.errors import SubspaceError

logger = logging.getLogger(__name__)
OFFLINE = ("HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE")
PATIENCE = 5.0  # seconds for the Hub to accept a connection, and again to answer

CORRELATED, PAIRED_F1, MATTHEWS = ("stsb",), ("mrpc", "qqp"), ("cola",)
GLUE_TASKS = (
    *(*MATTHEWS, "sst2", *PAIRED_F1, *CORRELATED),
    *("mnli", "mnli_mismatched", "mnli_matched", "qnli", "rte", "wnli", "hans"),
)
ROUGE_KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def load_metric(name: str, config_name: str | None = None) -> evaluate.EvaluationModule:
    """Load a metric by its published name.

    The twins' types are defined in this module; the published metrics' are not.

    Args:
        name: ``glue``, ``accuracy``, ``rouge`` or ``exact_match`` have a twin, which is used when the Hub does not
            answer within `PATIENCE` or offline mode is set. Any other metric that `evaluate.load` knows needs the Hub,
            or a folder with the metric's script, and is awaited as long as evaluate does.
        config_name: as in `evaluate.load`; for ``glue`` the task.

    Raises:
        SubspaceError: the metric cannot be loaded and there is no twin, or GLUE has no such task.
    """
    twins = {"glue": Glue, "accuracy": Accuracy, "rouge": Rouge, "exact_match": ExactMatch}
    local = _is_script(name)
    # made before the Hub is asked, so that a wrong configuration is the same error with and without it
    twin = twins[name](config_name=config_name) if name in twins and not local else None
    cause: Exception | None = None
    if not local and any(os.environ.get(it, "").upper() in ("1", "ON", "YES", "TRUE") for it in OFFLINE):
        reason = "not tried: offline mode"
    elif twin is not None and not _answers(evaluate.config.HF_ENDPOINT):
        reason = "the Hub does not answer"
    else:
        try:
            return evaluate.load(name, config_name)
        except (OSError, ImportError, ValueError) as error:
            # FileNotFoundError and ConnectionError, both OSError, or ImportError: the metric cannot be fetched
            cause, reason = error, str(error)
    if twin is None:
        raise SubspaceError(
            f"The metric {name!r} could not be loaded by evaluate ({reason}), and there is no twin of it here: there"
            f" are {', '.join(twins)}. Check the name and the network, or unset {' and '.join(OFFLINE)}."
        ) from cause
    logger.info("%s: the twin that comes with subspace_peft, not evaluate.load's (%s).", name, reason)
    return twin


def _is_script(name: str) -> bool:
    """Tell whether `evaluate.load` finds `name` on this machine: a script, or a folder with a script of its name."""
    stem = os.path.basename(os.path.normpath(name))
    return (name.endswith(".py") and os.path.isfile(name)) or os.path.isfile(os.path.join(name, f"{stem}.py"))


@functools.cache
def _answers(endpoint: str) -> bool:
    """Tell whether a server answers at `endpoint`; asked once per process, so that all its metrics are of one kind.

    Without this, `evaluate.load` itself would wait 100 seconds, three times over.
    """
    try:
        requests.head(endpoint, timeout=PATIENCE)
    except requests.RequestException as error:
        logger.debug("%s: %s", endpoint, error)
        return False
    return True


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f'This metric needs {name.partition(".")[0]}: pip install "subspace-peft[recipes]".'
        ) from error


def _check_counts(metric: str, predictions: Sequence[Any], references: Sequence[Any]) -> None:
    """Raise `SubspaceError` where there are no examples, or unequal counts of predictions and references."""
    if len(predictions) != len(references) or len(predictions) == 0:
        raise SubspaceError(
            f"{metric}: {len(predictions)} predictions for {len(references)} references; give as many of each, at"
            " least one."
        )


def _info(description: str, predictions: Any, references: Any, **more: Any) -> evaluate.MetricInfo:
    # several types of references are several sets of features, of which evaluate takes the one that fits
    sets = [datasets.Features({"predictions": predictions, "references": each}) for each in references]
    given = {"citation": "", "inputs_description": "predictions and references", **more}
    return evaluate.MetricInfo(description=description, features=sets if len(sets) > 1 else sets[0], **given)


class Glue(evaluate.Metric):
    """GLUE's metrics (Wang et al., arXiv 1804.07461); `config_name` is the task.

    Labels are integers, STS-B's scores floats. `compute` returns Python floats: ``accuracy``; for MRPC and QQP also
    ``f1``; for CoLA ``matthews_correlation``; for STS-B ``pearson`` and ``spearmanr``, NaN where either side is
    constant.

    Raises:
        SubspaceError: no such task; no examples.
        ImportError: scikit-learn or scipy is missing, where the task needs it.
    """

    def __init__(self, config_name: str | None = None, **kwargs: Any) -> None:
        if config_name not in GLUE_TASKS:
            raise SubspaceError(f"GLUE has no task {config_name!r}; choose one of {', '.join(GLUE_TASKS)}.")
        super().__init__(config_name=config_name, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        kind = datasets.Value("float32" if self.config_name in CORRELATED else "int64")
        return _info("GLUE's metrics", kind, [kind], citation="arXiv 1804.07461", format="numpy")

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        _check_counts(f"glue, {self.config_name}", predictions, references)
        if self.config_name in CORRELATED:
            if np.ptp(predictions) == 0 or np.ptp(references) == 0:
                return {"pearson": float("nan"), "spearmanr": float("nan")}
            stats = _library("scipy.stats")
            return {
                "pearson": float(stats.pearsonr(predictions, references)[0]),
                "spearmanr": float(stats.spearmanr(predictions, references)[0]),
            }
        sums = _library("sklearn.metrics")
        if self.config_name in MATTHEWS:
            return {"matthews_correlation": float(sums.matthews_corrcoef(references, predictions))}
        result = {"accuracy": float(sums.accuracy_score(references, predictions))}
        if self.config_name in PAIRED_F1:
            result["f1"] = float(sums.f1_score(y_true=references, y_pred=predictions))
        return result


class Accuracy(evaluate.Metric):
    """Share of predictions that equal their reference; with `config_name="multilabel"` of rows of labels that do.

    Raises:
        SubspaceError: no examples.
        ImportError: scikit-learn is missing.
    """

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int32")
        kind = datasets.Sequence(label) if self.config_name == "multilabel" else label
        return _info("accuracy", kind, [kind])

    def _compute(
        self,
        predictions: Sequence[Any],
        references: Sequence[Any],
        normalize: bool = True,
        sample_weight: Sequence[float] | None = None,
    ) -> dict[str, float]:
        _check_counts("accuracy", predictions, references)
        given = {"normalize": normalize, "sample_weight": sample_weight}
        both = np.asarray(references), np.asarray(predictions)
        return {"accuracy": float(_library("sklearn.metrics").accuracy_score(*both, **given))}


class ExactMatch(evaluate.Metric):
    """Share of predictions that equal their reference to the letter, as evaluate 0.4.6 has it.

    What is to be ignored is taken out of both first; two texts of which nothing is left are equal.

    Raises:
        SubspaceError: no examples.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return _info("exact match", text, [text])

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str],
        regexes_to_ignore: Sequence[str] | None = None,
        ignore_case: bool = False,
        ignore_punctuation: bool = False,
        ignore_numbers: bool = False,
    ) -> dict[str, Any]:
        _check_counts("exact_match", predictions, references)
        dropped = (string.punctuation if ignore_punctuation else "") + (string.digits if ignore_numbers else "")
        table = str.maketrans("", "", dropped)

        def reduced(text: str) -> str:
            for pattern in regexes_to_ignore or ():
                text = re.sub(pattern, "", text)
            return (text.lower() if ignore_case else text).translate(table)

        hits = [reduced(guess) == reduced(truth) for guess, truth in zip(predictions, references, strict=True)]
        return {"exact_match": sum(hits) / len(hits)}


class Rouge(evaluate.Metric):
    """ROUGE (Lin, 2004): mean F1 of each kind over the examples; of several references the best counts.

    Per example (``use_aggregator=False``) these are the published numbers to the bit. Aggregated, the published metric
    gives the median of a thousand bootstrap means, which depends on the state of numpy's generator and strays from the
    mean itself, given here, by about 0.002 at most on sixty short texts.

    Raises:
        SubspaceError: no examples, or an example without a reference.
        ImportError: rouge-score is missing.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return _info("ROUGE", text, [datasets.Sequence(text), text])

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add examples as evaluate does, which looks at the first one for the kind of references, and so needs one."""
        if predictions is not None and references is not None:
            _check_counts("rouge", predictions, references)
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[Any],
        rouge_types: Sequence[str] | None = None,
        use_aggregator: bool = True,
        use_stemmer: bool = False,
        tokenizer: Callable[[str], list[str]] | None = None,
    ) -> dict[str, Any]:
        scoring, tokenizers = _library("rouge_score.rouge_scorer"), _library("rouge_score.tokenizers")
        _check_counts("rouge", predictions, references)
        kinds = list(ROUGE_KINDS if rouge_types is None else rouge_types)

        class Given(tokenizers.Tokenizer):  # type: ignore[name-defined]
            def tokenize(self, text: str) -> list[str]:
                return tokenizer(text)  # type: ignore[misc]

        scorer = scoring.RougeScorer(kinds, use_stemmer=use_stemmer, tokenizer=None if tokenizer is None else Given())
        scores: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            known = [reference] if isinstance(reference, str) else list(reference)
            if not known:
                raise SubspaceError(f"rouge: example {number} has no reference; give at least one for each.")
            found = scorer.score_multi(known, prediction)
            for kind in kinds:
                scores[kind].append(found[kind].fmeasure)
        return {kind: sum(each) / len(each) for kind, each in scores.items()} if use_aggregator else scores
