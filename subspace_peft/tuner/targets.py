"""The layers that can be adapted: their kinds, sizes and weights."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
)
from peft.utils import resolve_quantization_backend
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D


def base_of(module: nn.Module) -> nn.Module:
    """Return the layer itself, or the one inside an adapter layer."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def backend_of(layer: nn.Module) -> QuantizationBackend | None:
    """Return PEFT's quantisation backend of a layer, for reading its weight; None where it is not quantised."""
    # PEFT wants torchao's callable for storing weights, even of those who only read
    return resolve_quantization_backend(layer, get_apply_tensor_subclass=_reads_only)


def _reads_only() -> Any:
    raise RuntimeError("This quantisation backend was made for reading weights.")


def kind_of(module: nn.Module) -> str | None:
    """Return the kind of a layer, or of the one inside an adapter layer; None where it is not supported.

    ``linear`` stands for `nn.Linear`, quantised kinds of it, and transformers' `Conv1D`; the others are ``conv2d``
    (without groups) and ``embedding``.
    """
    base = base_of(module)
    if isinstance(base, (nn.Linear, Conv1D)):
        return "linear"
    if isinstance(base, nn.Conv2d) and base.groups == 1:
        return "conv2d"
    if isinstance(base, nn.Embedding):
        return "embedding"
    # some quantised layers are no nn.Linear
    backend = backend_of(base)
    return "linear" if backend is not None and backend.layer_type == "linear" else None


def supported(module: nn.Module) -> bool:
    """Tell whether a layer can be adapted."""
    return kind_of(module) is not None and not is_never_called(module)


def is_never_called(module: nn.Module) -> bool:
    """Tell whether a layer is the ``out_proj`` of torch's `MultiheadAttention`.

    That takes the layer's weight without calling it, so an adapter around it would have no effect.
    """
    return isinstance(base_of(module), NonDynamicallyQuantizableLinear)


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a layer, or the one in an adapter layer, is transformers' `Conv1D`, whose weight is (in, out)."""
    return isinstance(base_of(module), Conv1D)


def sizes(module: nn.Module) -> tuple[int, int]:
    """Return (out, in) of a supported layer's weight as a matrix.

    That of a convolution is (out, in · height · width), that of an embedding (dimension, tokens).
    """
    base = base_of(module)
    if isinstance(base, nn.Conv2d):
        return base.out_channels, base.in_channels * base.kernel_size[0] * base.kernel_size[1]
    if isinstance(base, nn.Embedding):
        return base.embedding_dim, base.num_embeddings
    inner, out = _get_in_out_features(base)
    return int(out), int(inner)


def weight_shape(module: nn.Module) -> list[int] | None:
    """Return the weight's own shape, where it is neither a linear layer's nor a `Conv1D`'s."""
    return None if kind_of(module) == "linear" else list(base_of(module).weight.shape)


def readable(layer: nn.Module) -> bool:
    """Tell whether the layer's weight can be read and written: some quantised kinds only compute."""
    backend = backend_of(base_of(layer))
    return backend is None or backend.supports_merge


def base_weight(layer: nn.Module) -> torch.Tensor:
    """Return a readable layer's weight as a matrix (out, in), see `sizes`, in float32, dequantised where needed."""
    base = base_of(layer)
    backend = backend_of(base)
    weight = base.weight.detach() if backend is None else backend.get_base_weight(base).detach()
    return (weight.T if isinstance(base, (Conv1D, nn.Embedding)) else weight.flatten(1)).float()


def outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield names and modules in `named_modules`'s order, without what lies inside adapter layers.

    So it takes as many steps whatever the number of adapters.
    """
    seen: set[int] = set()

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield name, module
        if not isinstance(module, BaseTunerLayer):
            for child_name, child in module._modules.items():
                if child is not None:
                    yield from walk(f"{name}.{child_name}" if name else child_name, child)

    return walk("", model)


def target_names(model: nn.Module, config: PeftConfig, given: Container[str] | None = None) -> list[str]:
    """Return the names of the modules that PEFT is about to adapt: those in `given`, or those that targets match."""
    expanded = _maybe_include_all_linear_layers(config, model)
    return [
        name
        for name, _ in outer_modules(model)
        if name and (name in given if given is not None else BaseTuner._check_target_module_exists(expanded, name))
    ]
