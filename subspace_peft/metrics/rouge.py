"""ROUGE as an `evaluate.Metric` around the package rouge-score: the numbers of the published one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate

from .glue import check_numbers

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Rouge(evaluate.Metric):
    """Mean F1 of each kind over the examples; of several references the one that fits best counts (Lin, 2004).

    Raises:
        SubspaceError: predictions and references that are empty or of different lengths.
        ImportError: rouge-score is missing.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="ROUGE",
            citation="",
            inputs_description="predictions: texts; references: a text or a list of texts for each",
            features=[
                datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
                datasets.Features({"predictions": text, "references": text}),
            ],
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[Any],
        rouge_types: Sequence[str] = KINDS,
        use_aggregator: bool = True,
        use_stemmer: bool = False,
        tokenizer: Callable[[str], list[str]] | None = None,
    ) -> dict[str, Any]:
        try:
            from rouge_score import rouge_scorer, tokenizers
        except ImportError as error:
            raise ImportError("ROUGE needs rouge-score: pip install 'subspace-peft[recipes]'.") from error
        check_numbers("rouge", [0] * len(predictions), [0] * len(references))

        class Given(tokenizers.Tokenizer):
            def tokenize(self, text: str) -> list[str]:
                return tokenizer(text)  # type: ignore[misc]

        scorer = rouge_scorer.RougeScorer(
            list(rouge_types), use_stemmer=use_stemmer, tokenizer=None if tokenizer is None else Given()
        )
        scores: dict[str, list[float]] = {kind: [] for kind in rouge_types}
        for prediction, reference in zip(predictions, references, strict=True):
            known = [reference] if isinstance(reference, str) else list(reference)
            found = scorer.score_multi(known, prediction)
            for kind in rouge_types:
                scores[kind].append(found[kind].fmeasure)
        if not use_aggregator:
            return scores
        return {kind: sum(values) / len(values) for kind, values in scores.items()}
