"""The layers that can be adapted: their kinds, sizes and weights."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import nn
from transformers.pytorch_utils import Conv1D


def supported(module: nn.Module) -> bool:
    """Whether a layer can be adapted: `nn.Linear` (also quantised kinds of it) and transformers' `Conv1D`."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return isinstance(base, (nn.Linear, Conv1D))


def is_conv1d(module: nn.Module) -> bool:
    """Whether a layer, or the one inside an adapter layer, is transformers' `Conv1D`, whose weight is (in, out)."""
    return isinstance(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, Conv1D)


def sizes(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a supported layer."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    inner, out = _get_in_out_features(base)
    return int(out), int(inner)


def base_weight(layer: nn.Module) -> torch.Tensor:
    """The layer's weight as (out, in) float32, dequantised where needed."""
    from peft.utils import resolve_quantization_backend

    base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    backend = resolve_quantization_backend(base)
    weight = base.weight.detach() if backend is None else backend.get_base_weight(base).detach()
    return (weight.T if isinstance(base, Conv1D) else weight).float()


def outer_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Named modules without what lies inside adapter layers."""
    inside: list[str] = []
    outer = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        outer.append((name, module))
        if isinstance(module, BaseTunerLayer):
            inside.append(f"{name}.")
    return outer
