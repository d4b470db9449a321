"""Is this the base model that the basis was built for and the task was trained on?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..basis import SubspaceBasis
from ..basis.module_store import names_of
from ..errors import BasisMismatchError
from .targets import base_weight, readable

if TYPE_CHECKING:
    from .config import SubspaceConfig
    from .injection import Plan

PROBED_MODULES, PROBED_SIDE = 4, 3
SAME_WEIGHTS = 0.9  # cosine of probes: 4-bit quantisation of one model keeps 0.99, two models have about 0


def check_base_name(model: nn.Module, config: SubspaceConfig, basis: SubspaceBasis) -> None:
    """Two different Hub ids cannot be one model; folders may hold any copy, which only the probe can tell."""
    own = getattr(getattr(model, "config", None), "_name_or_path", None) or ""
    other = basis.base_model or ""
    both_ids = all(text.count("/") == 1 and text[0] not in "./~" for text in (own, other) if text) and own and other
    if config.check_base_model and both_ids and own != other:
        raise BasisMismatchError(
            f"The basis was built for {other!r}, but the model is {own!r}. Load that one, build a basis for this one,"
            " or pass check_base_model=False if you know that they share their weights."
        )


def check_probe(model: nn.Module, modules: Mapping[str, nn.Module], plan: Plan) -> None:
    """Record a few numbers ``UᵀW₀Vᵀ`` of the base weights in the config, or hold them against those of a loaded task.

    Raises:
        BasisMismatchError: the base model's weights are others; names modules in which they are.
    """
    config = plan.config
    probe = _probe(modules, plan)
    if probe is None:
        return
    # what a new task's configuration has on record is of an earlier use of it, maybe of other modules
    if config.base_probe is None or not config.loaded:
        config.base_probe = [float(f"{value:.4g}") for value in probe.tolist()]
    elif config.check_base_model and not _same(config.base_probe, probe):
        raise BasisMismatchError(
            f"The base model's weights are not those that the task was trained on ({config.base_model_name_or_path}):"
            f" this {type(model).__name__} ({getattr(getattr(model, 'config', None), '_name_or_path', '')}) has other"
            f" numbers in {names_of(_probed(plan), 2)}. Load that base model, or pass check_base_model=False in the"
            " config to try anyway."
        )


def same_weights(modules: Mapping[str, nn.Module], plan: Plan) -> bool:
    """Whether the config's record of the base weights is of these."""
    probe = _probe(modules, plan)
    return probe is None or plan.config.base_probe is None or _same(plan.config.base_probe, probe)


def _same(recorded: list[float], probe: torch.Tensor) -> bool:
    known = torch.tensor(recorded, dtype=torch.float32)
    return bool(known.shape == probe.shape and torch.cosine_similarity(known, probe, dim=0) > SAME_WEIGHTS)


def _probed(plan: Plan) -> list[str]:
    # evenly spread over the depth, and the same for the same targets
    names = list(plan.names)
    return sorted({names[i * (len(names) - 1) // max(PROBED_MODULES - 1, 1)] for i in range(PROBED_MODULES)})


def _probe(modules: Mapping[str, nn.Module], plan: Plan) -> torch.Tensor | None:
    """The numbers of the base weights as they are; None where they are not there, or not the base's own."""
    names = list(plan.names)
    if any(_is_merged(modules[name]) for name in names):
        return None
    if plan.basis is None or any(parameter.is_meta for name in names[:1] for parameter in modules[name].parameters()):
        return None
    if not all(readable(modules[name]) for name in _probed(plan)):
        return None
    values = []
    for name in _probed(plan):
        part = plan.module(name)
        weight = base_weight(modules[name]).cpu()
        values.append((part.U[:, :PROBED_SIDE].float().T @ weight @ part.V[:PROBED_SIDE].float().T).flatten())
    return torch.cat(values)


def _is_merged(module: nn.Module) -> bool:
    # adapter layers of several methods may lie one inside the other
    while isinstance(module, BaseTunerLayer):
        if module.merged_adapters:
            return True
        module = module.base_layer
    return False
