"""The front matter of cards: the Hub's metadata."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .facts import BaseFacts

# task type, or auto class, → the Hub's name for what such a model does
PIPELINES = {
    "SEQ_CLS": "text-classification",
    "CAUSAL_LM": "text-generation",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
AUTO_PIPELINES = {
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
}


def pipeline_tag(task_type: str | None, base: BaseFacts) -> str | None:
    """Return the Hub's name for what the model does, where it is certain; else None."""
    return AUTO_PIPELINES.get(base.auto_class or "") or PIPELINES.get(task_type or "")


def front_matter(
    kind: str,
    base: BaseFacts,
    *,
    task_type: str | None = None,
    coefficients: Iterable[str] = (),
    datasets: Sequence[str] = (),
    title: str = "",
    results: Sequence[tuple[str | None, str, float]] = (),
) -> dict[str, Any]:
    """Return the Hub's metadata for a card.

    Args:
        kind: ``basis``, ``task`` or ``bundle``.
        base: the base model.
        task_type: PEFT's, of the tasks.
        coefficients: kinds of coefficients.
        datasets: Hub ids.
        title: name of the model in its model index.
        results: (split, metric, number) each, in the model index where there is one known dataset.
    """
    from huggingface_hub import EvalResult, ModelCardData

    pipeline = pipeline_tag(task_type, base)
    tags = {"subspace", f"subspace-{kind}", *(f"subspace-{each}" for each in coefficients)}
    index = {}
    if pipeline and len(datasets) == 1 and results:
        made = [
            EvalResult(
                task_type=pipeline,
                dataset_type=datasets[0],
                dataset_name=datasets[0],
                dataset_split=split,
                metric_type=metric,
                metric_value=value,
            )
            for split, metric, value in results
        ]
        index = {"model_name": title, "eval_results": made}
    more = {"base_model_relation": "adapter"} if base.hub_id and kind != "basis" else {}
    data = ModelCardData(
        library_name="peft",
        base_model=base.hub_id,
        pipeline_tag=pipeline,
        datasets=list(datasets) or None,
        tags=sorted(tags | ({base.family} if base.family else set())),
        **index,
        **more,
    )
    return dict(data.to_dict())
