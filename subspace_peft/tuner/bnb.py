"""Adapted layers with bitsandbytes' quantised weights: train, merge and unmerge them without loss."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass

import torch
from torch import nn

from .targets import base_of, outer_modules


def keep_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from rearranging 4-bit weights on a CPU, and undo it where it was done.

    On CPUs with AVX512-BF16 bitsandbytes puts a 4-bit layer's weight in another layout when the layer is evaluated.
    From then on no gradient passes through it, in training mode neither, and PEFT dequantises it to other values.
    That goes for all 4-bit layers of a model: gradients pass through those between the adapted ones too.
    """
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is None:
        return
    for _, outer in outer_modules(model):
        module = base_of(outer)
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            unpack(module)
            module.support_avx512bf16_for_cpu = False


def unpack(layer: nn.Module) -> None:
    """Undo that layout in one layer, if it has it; block scales stay rounded to bfloat16."""
    weight = getattr(layer, "weight", None)
    if not getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        return
    # bitsandbytes' own way back, which it goes before a layer is saved; it leaves simple scales transposed
    layer.state_dict()
    state = layer.weight.quant_state
    if state.absmax.dim() == 2:
        state.absmax = state.absmax.T.reshape(-1).float()


@dataclass(frozen=True, eq=False)
class KeptWeight:
    """A quantised weight as it was before a merge: requantising what is taken out again would not give it back.

    Attributes:
        weight: the parameter, whose storage a merge leaves alone.
        scales: (out,) of 8-bit rows; None for 4 bits, where the parameter has them itself.
    """

    weight: nn.Parameter
    scales: torch.Tensor | None

    @classmethod
    def of(cls, layer: nn.Module) -> KeptWeight | None:
        """Return the weight of `layer`; None unless it is one that bitsandbytes has quantised."""
        weight = getattr(layer, "weight", None)
        kind = type(weight).__name__
        if kind == "Params4bit" and weight.bnb_quantized:
            # a copy with the same storage: PEFT marks the parameter itself as not quantised yet
            return cls(copy.copy(weight), None)
        if kind == "Int8Params" and weight.dtype == torch.int8:
            # the first forward pass moves the scales from the weight to the layer's state
            return cls(weight, layer.state.SCB if weight.SCB is None else weight.SCB)
        return None

    def restore(self, layer: nn.Module) -> None:
        """Put the weight back into `layer`, on the device where it is now."""
        device = layer.weight.device
        if self.scales is None:
            layer.weight = self.weight.to(device)
            layer.quant_state = layer.weight.quant_state
            return
        data = self.weight.data.to(device)
        layer.weight = type(self.weight)(data, requires_grad=False, CB=data, SCB=self.scales.to(device))
        layer.state.reset_grads()
