"""Turn variants of LoRA into plain LoRAs, by what merging them does to the base model's weights.

PEFT's `convert_to_lora` takes ``s·B·A`` of a LoRA for its update, which a variant's is not: a DoRA's magnitude, a
KaSA's cut singular values and a start that moved the base weights would be lost. Here the update is the merged weight
less the base model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..basis.module import FLOAT_DTYPES
from ..errors import SourceError

ROUNDING = 1e-11  # a share of an update's energy that counts as rounding, such as that of weights moved in float32
WIDEST = 4  # an update that is whole, up to rounding, at this many times the adapter's rank is kept whole


def keep_weights(base_model: nn.Module, wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return copies of the weights that an adapter with these keys may change when PEFT starts it.

    Args:
        base_model: the model that it is to be put on.
        wanted: the adapter's tensors.
    """
    own = {key.partition(".lora_")[0].rpartition(".")[2] for key in wanted if ".lora_" in key}
    return {
        name: module.weight.detach().clone()
        for name, module in base_model.named_modules()
        if name.rpartition(".")[2] in own and isinstance(getattr(module, "weight", None), torch.Tensor)
    }


def put_back(base_model: nn.Module, kept: Mapping[str, torch.Tensor]) -> None:
    """Write weights of `keep_weights` back into a model without adapters."""
    for name, weight in kept.items():
        base_model.get_submodule(name).weight.data = weight


def merged_factors(
    model: Any, kept: Mapping[str, torch.Tensor], energy: float, location: str
) -> tuple[dict[str, torch.Tensor], float]:
    """Return the factors of an adapter's whole update, under PEFT's keys, and the share of its energy that is lost.

    An update of low rank is kept whole, another one to `energy`. One layer at a time is merged, in float64.

    Args:
        model: a PeftModel with the one adapter ``default`` of a LoRA's kind.
        kept: module → its weight before the adapter was put on the model.
        energy: share of each update's energy that the factors have to keep.
        location: named in errors.

    Raises:
        SourceError: the base model is quantised, or a layer is of a kind that no basis holds.
    """
    factors: dict[str, torch.Tensor] = {}
    lost = total = 0.0
    for name, layer in _layers(model):
        delta = _merged(layer, kept.get(name), f"{location}: {name}")
        embedding, shape = isinstance(layer.get_base_layer(), nn.Embedding), delta.shape
        flat = delta.T if embedding or _is_transposed(layer) else delta.flatten(1)
        U, S, Vh = torch.linalg.svd(flat, full_matrices=False)
        squares = S.square()
        rank = _rank(squares, 1 - ROUNDING)
        if rank > WIDEST * _own_rank(layer):
            rank = _rank(squares, energy)
        lost, total = lost + float(squares[rank:].sum()), total + float(squares.sum())
        B, A = (U[:, :rank] * S[:rank]).contiguous(), Vh[:rank].contiguous()
        if embedding:
            factors |= {f"{name}.lora_embedding_A": A, f"{name}.lora_embedding_B": B}
            continue
        if delta.dim() == 4:
            A, B = A.view(rank, *shape[1:]), B[:, :, None, None]
        factors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    return factors, lost / total if total else 0.0


def _rank(squares: torch.Tensor, energy: float) -> int:
    """Return how many of the leading squares make up this share of all."""
    return min(int((squares.cumsum(0) < energy * squares.sum()).sum()) + 1, len(squares))


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer) and hasattr(layer, "merge"):
            yield name, layer


def _own_rank(layer: Any) -> int:
    """Return the adapter's rank in a layer of LoRA or MiSS."""
    return int(getattr(layer, "r" if hasattr(layer, "r") else "miss_r")["default"])


def _merged(layer: Any, before: torch.Tensor | None, where: str) -> torch.Tensor:
    """Return the weight with the adapter merged, less the one before it came (float64)."""
    base = layer.get_base_layer()
    if type(layer).__name__ in ("ParamWrapper", "MultiheadAttention") or getattr(base, "groups", 1) != 1:
        raise SourceError(f"{where}: a basis is of modules that are matrices, which {type(base).__name__} is not.")
    if base.weight.dtype not in FLOAT_DTYPES:
        raise SourceError(
            f"{where}: its weight is of {base.weight.dtype}. Pass the base model without quantisation, so that what"
            " the adapter does to its weights can be told."
        )
    held = {parameter: parameter.data for parameter in base.parameters()}
    before = (base.weight.data if before is None else before).double().clone()
    try:
        layer.double()
        layer.merge(adapter_names=["default"])
        return base.weight.data - before
    finally:
        layer.merged_adapters.clear()
        for parameter, data in held.items():
            parameter.data = data


def _is_transposed(layer: Any) -> bool:
    return bool(getattr(layer, "fan_in_fan_out", False))
