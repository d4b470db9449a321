"""Facts read from a file: those that are well-formed, since the file may come from elsewhere or a later version."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .._io.untrusted import is_finite, is_whole

Check = Callable[[Any], bool]
MOST = 1 << 63


def recorded(card: Any) -> dict[str, Any]:
    """Return the well-formed facts of a task configuration's `card`; others are left out.

    Args:
        card: as read from JSON; None and values other than a dict count as an empty one.

    Returns:
        Those of ``base``, ``training``, ``metrics``, ``controls`` and ``datasets`` that are there, for `BaseFacts` and
        `TaskFacts`.
    """
    card = card if isinstance(card, Mapping) else {}
    found: dict[str, Any] = {}
    if base := _only(card.get("base"), BASE):
        found["base"] = {
            key: tuple(value) if isinstance(value, (list, tuple)) else value for key, value in base.items()
        }
    if training := _scalars(card.get("training")):
        found["training"] = training
    metrics = card.get("metrics")
    if isinstance(metrics, Mapping):
        splits = {split: _numbers(numbers) for split, numbers in metrics.items() if isinstance(split, str)}
        found["metrics"] = {split: numbers for split, numbers in splits.items() if numbers}
    if controls := _controls(card.get("controls")):
        found["controls"] = controls
    if _texts(card.get("datasets")):
        found["datasets"] = tuple(card["datasets"])
    return found


def _only(value: Any, checks: Mapping[str, Check]) -> dict[str, Any]:
    """Return the entries of a mapping that their checks pass."""
    if not isinstance(value, Mapping):
        return {}
    return {key: value[key] for key, check in checks.items() if key in value and check(value[key])}


def _scalars(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {}
    return {key: each for key, each in value.items() if isinstance(key, str) and isinstance(each, (str, int, float))}


def _numbers(value: Any) -> dict[str, Any]:
    return {key: each for key, each in _scalars(value).items() if _is_number(each)}


def _controls(value: Any) -> dict[str, Any] | None:
    """Return a comparison with controls; None where a row lacks something."""
    if not isinstance(value, Mapping) or not isinstance(value.get("rows"), list):
        return None
    rows = [{"test_sd": None, "diverged": 0, "rate": None, **_only(row, ROW)} for row in value["rows"]]
    if not rows or any(row.keys() != ROW.keys() for row in rows):
        return None
    return {**_only(value, {"title": _is_text, "score": _is_text}), "rows": rows}


def _is_number(value: Any) -> bool:
    """Return whether `value` is a number other than a boolean; infinite ones count."""
    return isinstance(value, float) or is_finite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_text, value))


def _count(value: Any) -> bool:
    return is_whole(value, least=0, most=MOST)


def _number_or_none(value: Any) -> bool:
    return value is None or _is_number(value)


BASE: dict[str, Check] = {
    "auto_class": _is_text,
    "class_name": _is_text,
    "family": _is_text,
    "num_labels": _count,
    "labels": _texts,
    "code": _texts,
    "injected": lambda value: isinstance(value, bool),
}
ROW: dict[str, Check] = {
    "method": _is_text,
    "test": _number_or_none,
    "test_sd": _number_or_none,
    "seeds": _count,
    "diverged": _count,
    "rate": _number_or_none,
    "trained_adapter": _number_or_none,
    "trained_head": _number_or_none,
    "bytes": _number_or_none,
}
