"""The size of a task: trained parameters and bytes, of the adapter and of the head."""

from __future__ import annotations

import tempfile
from pathlib import Path

from peft import PeftModel
from torch import nn


def measure(model: nn.Module) -> dict[str, int]:
    """Return the sizes of a model's trained part.

    These are ``trained_adapter`` and ``trained_head`` (parameters that require grad) and ``bytes``, the adapter's
    saved file without the head.

    The head is what PEFT's `modules_to_save` hold; in a model without an adapter, everything that is trained. The
    adapter is really saved, into a temporary folder, so ask before training: sizes do not depend on what was learnt.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not isinstance(model, PeftModel):
        return {"trained_adapter": 0, "trained_head": sum(p.numel() for p in trained.values()), "bytes": 0}
    head = {name: parameter for name, parameter in trained.items() if ".modules_to_save." in name}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        model.save_pretrained(scratch)
        size = (Path(scratch) / "adapter_model.safetensors").stat().st_size
    numbers = sum(parameter.numel() for parameter in head.values())
    return {
        "trained_adapter": sum(parameter.numel() for parameter in trained.values()) - numbers,
        "trained_head": numbers,
        "bytes": size - sum(parameter.numel() * parameter.element_size() for parameter in head.values()),
    }
