"""Take the entries that identify a base model's weights out of a live model, without reading whole matrices."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..base_names import read_name
from ..basis import SubspaceBasis
from ..basis.base_weights import ENTRIES, WeightSample, places, sizes_of_record
from ..errors import BasisMismatchError
from .module_names import names_in_basis
from .targets import backend_of, base_of, base_weight, outer_modules, readable, sizes, supported

QUANTISED_READ = 4  # a quantised weight is dequantised as a whole for a few of its entries
IN_TASK = 8  # modules in a task's own record
RUN = 256  # neighbouring entries, by whose different values rounding is noticed
FEW = 0.7  # share of different values: 0.88 of 256 entries in bfloat16, 0.5 of 8 bits per row, 0.25 of nf4


def model_name(model: nn.Module) -> str:
    """Return the Hub id or folder that a model was loaded from; empty where it does not say."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", None) or "")


class BaseWeights:
    """The weights of a model's layers, a few entries at a time.

    Args:
        model: the base model, adapted or not.
        layers: module of the basis → the layer, in the basis's order.
        known: entries that were read before, by module.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        known: dict[str, torch.Tensor | None] | None = None,
    ) -> None:
        self.layers = layers
        name = read_name(model_name(model))
        self.model = type(model).__name__ if name is None else name.shown
        # a model that was dequantised while it was loaded still says so
        config = getattr(model, "config", None)
        self.said_quantised = bool(getattr(model, "is_quantized", False)) or bool(
            getattr(config, "quantization_config", None)
        )
        self.merged = any(map(is_merged, layers.values()))
        self.quantised = {name for name, layer in layers.items() if backend_of(base_of(layer)) is not None}
        self.found: dict[str, torch.Tensor | None] = {} if known is None else known

    def sample(self, taken: str, most: int, also: Collection[str] = ()) -> WeightSample | None:
        """Return entries of up to `most` modules, evenly spread, and of those of `also` that there are.

        Args:
            taken: when, for the record.
            most: modules; fewer of quantised weights.
            also: modules of a record to compare with.

        Returns:
            None where adapters are merged into the weights, or where none can be read: on the meta device, sharded, or
            of a kind that only computes.
        """
        if self.merged:
            return None
        names = list(self.layers)
        kept, count = sizes_of_record(len(names), most)
        wanted = spread(names, kept)
        wanted += [name for name in names if name in also and name not in wanted]
        # those of the record, where there are any, else the same ones whatever is asked for
        quantised = [name for name in names if name in self.quantised]
        few = spread([name for name in quantised if name in also] or quantised, QUANTISED_READ)
        wanted = [name for name in names if name in few or (name in wanted and name not in self.quantised)]
        values = {}
        for name in wanted:
            if (entries := self._entries(name)) is not None:
                values[name] = entries if name in also else entries[:count]
        if not values:
            return None
        first = base_of(self.layers[next(iter(values))]).weight
        kind = f"quantised ({type(first).__name__})" if self.quantised & values.keys() else _dtype(first)
        return WeightSample(values, kind, self._rounded(values), self.model, taken)

    def _entries(self, name: str) -> torch.Tensor | None:
        if name not in self.found:
            self.found[name] = entries_of(name, self.layers[name])
        return self.found[name]

    def _rounded(self, names: Collection[str]) -> bool:
        if self.said_quantised or self.quantised & set(names):
            return True
        shares = [share for name in spread(list(names), IN_TASK) if (share := _variety(self.layers[name])) is not None]
        return bool(shares) and sorted(shares)[len(shares) // 2] < FEW


def spread(names: Sequence[str], most: int) -> list[str]:
    """Return up to `most` of some names, evenly spread."""
    if len(names) <= most:
        return list(names)
    return [names[i * (len(names) - 1) // max(most - 1, 1)] for i in range(most)]


def entries_of(name: str, layer: nn.Module) -> torch.Tensor | None:
    """Return the entries of a layer's weight that belong in a record, (128,) float32 on the CPU.

    Args:
        name: the module's name in the basis, which the places follow from.
        layer: the layer, or an adapter layer around it.

    Returns:
        None where they cannot be read.
    """
    out, inner = sizes(layer)
    at = places(name, out, inner, ENTRIES)
    base = base_of(layer)
    if backend_of(base) is not None:
        return base_weight(layer)[at[:, 0], at[:, 1]].float().cpu() if readable(layer) else None
    weight = _plain(base)
    if weight is None or weight.numel() != out * inner:
        return None
    if isinstance(base, (Conv1D, nn.Embedding)):
        found = weight[at[:, 1].to(weight.device), at[:, 0].to(weight.device)]
    else:
        found = weight.flatten(1)[at[:, 0].to(weight.device), at[:, 1].to(weight.device)]
    found = found.float().cpu()
    return found if bool(found.isfinite().all()) else None


def _plain(base: nn.Module) -> torch.Tensor | None:
    """Return an unquantised layer's weight, also one that accelerate keeps elsewhere; None where it is not here."""
    weight: Any = getattr(base, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.is_meta:
        hook = getattr(base, "_hf_hook", None)
        maps = [getattr(each, "weights_map", None) for each in (hook, *getattr(hook, "hooks", ()))]
        stored = next((each for each in maps if each is not None and "weight" in each), None)
        weight = None if stored is None else stored["weight"]
    if not isinstance(weight, torch.Tensor) or weight.is_meta or hasattr(weight, "device_mesh"):
        return None
    # values of one byte mean something only with scales that are not given here
    return weight.detach() if weight.is_floating_point() and weight.element_size() > 1 and weight.numel() else None


def _variety(layer: nn.Module) -> float | None:
    """Return the share of different values among neighbouring entries other than zero; None of too few."""
    weight = _plain(base_of(layer))
    if weight is None or weight.dim() < 2:
        return None
    rows = weight.flatten(1)
    count = -(-RUN // rows.shape[1])
    begin = max(0, (rows.shape[0] - count) // 2)
    run = rows[begin : begin + count].flatten()[:RUN].float()
    run = run[run != 0]
    return len(run.unique()) / len(run) if len(run) >= RUN // 4 else None


def _dtype(weight: Any) -> str:
    return str(weight.dtype).removeprefix("torch.") if isinstance(weight, torch.Tensor) else "unknown"


def is_merged(module: nn.Module) -> bool:
    """Tell whether an adapter is merged into a layer's weight."""
    # adapter layers of several methods may lie one inside the other
    while isinstance(module, BaseTunerLayer):
        if module.merged_adapters:
            return True
        module = module.base_layer
    return False


def layers_of(model: nn.Module, basis: SubspaceBasis) -> dict[str, nn.Module]:
    """Return module of a basis → the model's layer, in the basis's order, of all that the model has.

    Args:
        model: the base model, adapted or not.
        basis: the basis.

    Returns:
        Nothing where names do not tell which modules they are, as of a pipeline's two text encoders.
    """
    there = {name: module for name, module in outer_modules(model) if name and supported(module)}
    found: dict[str, nn.Module] = {}
    try:
        names = names_in_basis(model, basis, list(there))
    except BasisMismatchError:
        return {}
    for name, key in names.items():
        if key is not None:
            found.setdefault(key, there[name])
    return {key: found[key] for key in basis if key in found}
