"""Pieces that the cards of bases, tasks and bundles share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .facts import BaseFacts, BasisReferenceFacts, Place

REMEDY = (
    "`KeyError: 'SUBSPACE'` means that the process has not imported `subspace_peft`: `pip install subspace-peft`, and"
    " `import subspace_peft` before loading; a stock script runs unchanged with `subspace-peft run script.py`."
)
IMPORT = "import subspace_peft  # registers the SUBSPACE method with PEFT"
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
    """The Hub's name for what the model does, where it is certain."""
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
    """The Hub's metadata, `results` (split, metric, number) as a model index where they belong to one known
    dataset."""
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


def base_code(base: BaseFacts) -> tuple[list[str], list[str]] | None:
    """Imports, and lines that make `base_model`; None where that is not known."""
    if base.code:
        return [], list(base.code)
    if base.reference is None or base.auto_class is None:
        return None
    given = [quoted(base.reference)]
    if base.revision:
        given.append(f"revision={quoted(base.revision)}")
    if base.labels:
        given.append(f"id2label={dict(enumerate(base.labels))!r}")
    elif base.num_labels is not None:
        given.append(f"num_labels={base.num_labels}")
    if base.num_labels is not None:
        # the checkpoint's own head may have other classes; it is replaced by the task's
        given.append("ignore_mismatched_sizes=True")
    return [f"from transformers import {base.auto_class}"], [
        f"base_model = {base.auto_class}.from_pretrained({', '.join(given)})"
    ]


def snippet(base: BaseFacts, imports: Sequence[str], lines: Sequence[str]) -> str:
    """A code block that makes the base model and goes on with `lines`."""
    known = base_code(base)
    if known is None:
        of = f", a {base.class_name}," if base.class_name else ""
        first, made = [], [f"# base_model: the base model{of} as you load it"]
    else:
        first, made = known
    return "\n".join(["```python", IMPORT, *imports, *first, "", *made, *lines, "```"])


def location(place: Place) -> str:
    """As arguments of `from_pretrained`."""
    return ", ".join(
        [quoted(place.reference)]
        + [f"{name}={quoted(value)}" for name in ("subfolder", "revision") if (value := getattr(place, name))]
    )


def base_words(base: BaseFacts) -> str:
    """The base model in words."""
    return f"`{base.reference}`" if base.reference else "a base model that was not recorded"


def basis_lines(basis: BasisReferenceFacts) -> list[str]:
    """What to know of the basis, as a list."""
    if basis.reference is None:
        lines = ["- basis: in this file"]
    else:
        at = f" at revision `{basis.revision}`" if basis.revision else ""
        lines = [f"- basis: `{basis.reference}`{at}; loading finds and verifies it"]
    return [*lines, *([f"- fingerprint: `{basis.fingerprint}`"] if basis.fingerprint else [])]


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; a bar in a cell would end it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def section(title: str, *parts: str) -> str:
    return "\n\n".join([f"## {title}", *(part for part in parts if part)])


def number(value: Any) -> str:
    """As a table prints it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def flat(metrics: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str, float]]:
    """(split, metric, number)."""
    return [(split, name, value) for split, numbers in metrics.items() for name, value in numbers.items()]


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
