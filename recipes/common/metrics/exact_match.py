"""Exact match as an `evaluate.Metric`: the numbers of the published one, as of evaluate 0.4.6."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from .glue import check_numbers


class ExactMatch(evaluate.Metric):
    """Share of predictions that equal their reference to the letter, after what is to be ignored has been taken out of
    both; two texts of which nothing is left are equal.

    Raises:
        SubspaceError: predictions and references that are empty or of different lengths.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="exact match",
            citation="",
            inputs_description="predictions and references: texts",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str],
        regexes_to_ignore: Sequence[str] | None = None,
        ignore_case: bool = False,
        ignore_punctuation: bool = False,
        ignore_numbers: bool = False,
    ) -> dict[str, Any]:
        check_numbers("exact_match", [0] * len(predictions), [0] * len(references))
        dropped = (string.punctuation if ignore_punctuation else "") + (string.digits if ignore_numbers else "")
        table = str.maketrans("", "", dropped)

        def reduced(text: str) -> str:
            for pattern in regexes_to_ignore or ():
                text = re.sub(pattern, "", text)
            return (text.lower() if ignore_case else text).translate(table)

        hits = [reduced(guess) == reduced(truth) for guess, truth in zip(predictions, references, strict=True)]
        return {"exact_match": sum(hits) / len(hits)}
