"""Check that a base model is the one that the basis was built for and the task was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..base_names import SAME, BaseName, difference, known_names, read_name, relation
from ..basis import SubspaceBasis
from ..errors import BasisMismatchError
from .targets import base_weight, readable
from .task_sizes import TaskSizes

PROBED_MODULES, PROBED_SIDE = 4, 3
SAME_WEIGHTS = 0.9  # cosine of probes: 4-bit quantisation of one model keeps 0.99, two models have about 0


def check_base_name(model: nn.Module, info: Mapping[str, Any]) -> None:
    """Refuse a model with another Hub id than the one that the basis was built for.

    Two different Hub ids cannot be one model unless the basis's record says so; folders may hold any copy, which only
    the weights can tell.

    Args:
        model: the base model.
        info: the basis's record, see `known_names`.

    Raises:
        BasisMismatchError: both are Hub ids with their owners, and differ.
    """
    own = read_name(model_name(model))
    if own is None or not _whole_id(own) or own.real is not None:
        return
    known = [read for name in known_names(info) if (read := read_name(name)) is not None]
    if known and all(_whole_id(each) and relation(own.text, each.text) != SAME for each in known):
        raise BasisMismatchError(
            f"The basis was built for {known[0].text!r}, but the model is {own.text!r}:"
            f" {difference(known[0].text, own.text)}. Load that one, build a basis for this one, or pass"
            " check_base_model=False if you know that they share their weights."
        )


def model_name(model: nn.Module) -> str:
    """Return the Hub id or folder that a model was loaded from; empty where it does not say."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", None) or "")


def _whole_id(name: BaseName) -> bool:
    return name.is_id and "/" in name.text


def probed_modules(names: Sequence[str]) -> list[str]:
    """Return the modules whose weights are probed: evenly spread over the depth, the same for the same targets."""
    return sorted({names[i * (len(names) - 1) // max(PROBED_MODULES - 1, 1)] for i in range(PROBED_MODULES)})


def probe(
    layers: Mapping[str, nn.Module], basis: SubspaceBasis, names: Mapping[str, str], sizes: TaskSizes
) -> list[float] | None:
    """Return a few numbers ``UᵀW₀Vᵀ`` of the base weights, by which a wrong base model is noticed.

    Args:
        layers: target module → layer, in the model's order.
        basis: the adapter's.
        names: target module → its name in the basis.
        sizes: which part of the basis the adapter uses.

    Returns:
        The numbers; None where the weights are not there, cannot be read, or hold merged updates.
    """
    probed = probed_modules(list(layers))
    if any(map(_is_merged, layers.values())):
        return None
    if any(parameter.is_meta for parameter in next(iter(layers.values())).parameters()):
        return None
    if not all(readable(layers[name]) for name in probed):
        return None
    values = []
    for name in probed:
        part = sizes.part(name, basis[names[name]])
        weight = base_weight(layers[name]).cpu()
        values.append((part.U[:, :PROBED_SIDE].float().T @ weight @ part.V[:PROBED_SIDE].float().T).flatten())
    return torch.cat(values).tolist()


def same_weights(recorded: Sequence[float], found: Sequence[float]) -> bool:
    """Tell whether two probes may be of one model's weights, such as a quantised copy's."""
    one, other = torch.tensor(recorded, dtype=torch.float32), torch.tensor(found, dtype=torch.float32)
    return bool(one.shape == other.shape and torch.cosine_similarity(one, other, dim=0) > SAME_WEIGHTS)


def _is_merged(module: nn.Module) -> bool:
    # adapter layers of several methods may lie one inside the other
    while isinstance(module, BaseTunerLayer):
        if module.merged_adapters:
            return True
        module = module.base_layer
    return False
