"""Questions to an adapted model that PEFT and transformers answer differently."""

from __future__ import annotations

from typing import Any


def active_adapter(model: Any) -> str:
    """Return the (first) active adapter of a PeftModel, or of a model adapted by transformers' own `add_adapter`."""
    active = model.active_adapters
    names = active() if callable(active) else active
    return names if isinstance(names, str) else str(names[0])
