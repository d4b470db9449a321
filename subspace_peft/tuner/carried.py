"""The basis among the tensors of an adapter that are about to be saved: added where it is asked for, and described."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .adapter_layer import AdapterLayer
from .config import SubspaceConfig
from .plan import carried_entry


def add_basis(model: nn.Module, adapter: str, tensors: dict[str, torch.Tensor]) -> None:
    """Add the adapter's basis to its `tensors`, which PEFT has taken out of the model's state dict."""
    for layer, keys in _layers(model, adapter):
        for name, key in keys.items():
            value = getattr(layer, f"subspace_{name}").get(adapter)
            if value is not None:
                tensors.setdefault(key, value.detach())


def carried_in(
    model: nn.Module, adapter: str, tensors: Mapping[str, torch.Tensor], config: SubspaceConfig
) -> dict[str, Any]:
    """Return the shapes and hashes of the basis among the adapter's `tensors`, by module; empty where there is none.

    Those that `config` has are of what the task was trained on, and stay.
    """
    entries = {}
    for layer, keys in _layers(model, adapter):
        names = {name for name, key in keys.items() if key in tensors}
        if not names:
            continue
        entry = (config.basis_modules or {}).get(layer.key)
        if entry is None or not names <= entry["sha256"].keys():
            entry = carried_entry(config, layer.basis_part(adapter))
        sha256 = {name: value for name, value in entry["sha256"].items() if name in names}
        entries[layer.key] = {**entry, "sha256": sha256}
    return entries


def _layers(model: nn.Module, adapter: str) -> Iterator[tuple[AdapterLayer, dict[str, str]]]:
    """Yield the adapter's layers, each with the keys that the basis's tensors have in a state dict, by name."""
    for name, layer in model.named_modules():
        if isinstance(layer, AdapterLayer) and adapter in layer.subspace_coef:
            # FSDP's state dict is of the model that it wraps
            place = name.removeprefix("_fsdp_wrapped_module.")
            yield layer, {part: f"{place}.subspace_{part}.{adapter}" for part in "UVMG"}
