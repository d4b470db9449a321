"""What a model says of its adapters, whoever adapted it."""

from __future__ import annotations

from typing import Any


def active_adapter(model: Any) -> str:
    """The (first) active adapter of a PeftModel, or of a model adapted by transformers' own `add_adapter`."""
    active = model.active_adapters
    names = active() if callable(active) else active
    return names if isinstance(names, str) else str(names[0])
