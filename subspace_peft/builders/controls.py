"""Builders that need no fleet: `random` and `base-weights`, the controls."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..basis import ModuleBasis
from ..basis.controls import base_weight_module, random_module, with_random_directions
from ..basis.matching import same_plain_module
from ..basis.module_store import near_names
from ..errors import SubspaceError
from .options import BuildOptions

Sizes = tuple[int, int, int, int]  # out, in, k_out, k_in


def control_module(name: str, sizes: Sizes, options: BuildOptions, weight: torch.Tensor | None) -> ModuleBasis:
    """Build one module of a `random` or `base-weights` basis.

    Args:
        name: the module's name, which the random directions are a function of.
        sizes: out, in, k_out, k_in.
        options: of which ``builder``, ``seed`` and ``directions`` count.
        weight: the base weight (out, in), for `base-weights`.
    """
    out, inner, k_out, k_in = sizes
    if weight is None:
        module = random_module(name, out, inner, k_out, k_in, options.seed)
    else:
        module = base_weight_module(weight, max(k_out, k_in)).truncate(k_out, k_in)
    return with_random_directions(name, module, options.directions, options.seed) if options.directions else module


def linear_weights(model: nn.Module, target_modules: str | Sequence[str] | None) -> dict[str, torch.Tensor]:
    """Return weights (out, in) of a model's linear layers, and of `Conv1D` transposed, that `target_modules` names.

    Raises:
        SubspaceError: none matches, or one is quantised.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    from transformers.pytorch_utils import Conv1D

    if target_modules is None:
        raise SubspaceError("Say which of the base model's modules: target_modules=['query', 'value'], for example.")
    given = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(target_modules=given)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and (
            given == "all-linear" or check_target_module_exists(config, name)
        ):
            if not module.weight.is_floating_point():
                raise SubspaceError(
                    f"Module {name!r} of the base model is quantised ({type(module).__name__}). Pass the unquantised"
                    " base model, or let SubspaceConfig(basis='base-weights') make the basis on this one."
                )
            found[name] = module.weight.T if isinstance(module, Conv1D) else module.weight
    if not found:
        raise SubspaceError(f"target_modules={target_modules!r} matches no linear layer of {type(model).__name__}.")
    if not isinstance(given, str):
        _check_entries(given, found, model)
    return found


def _check_entries(given: Sequence[str], found: Collection[str], model: nn.Module) -> None:
    """Raise `SubspaceError` where a name beside right ones matches no linear layer."""
    wrong = [each for each in given if not any(name == each or name.endswith(f".{each}") for name in found)]
    if wrong:
        ends = sorted({name.rpartition(".")[2] for name, _ in model.named_modules()})
        near = [f"{each!r} ({', '.join(near_names(each, ends)) or 'nothing is near it'})" for each in wrong]
        raise SubspaceError(
            f"target_modules=: {', '.join(near)} matches no linear layer of {type(model).__name__}; near names in"
            " brackets. Correct it, or leave it out."
        )


def weight_for(name: str, weights: Mapping[str, Any], shape: tuple[int, int]) -> torch.Tensor:
    """Return the base weight (out, in) of a module.

    Raises:
        SubspaceError: there is none of that name and shape, or several.
    """
    hits = same_plain_module(name, weights)
    if len(hits) != 1 or tuple(weights[hits[0]].shape) != shape:
        raise SubspaceError(
            f"Module {name!r} of shape {shape} is not among the base model's given target_modules. Pass the base model"
            " with base_model= and the same modules with target_modules=."
        )
    return weights[hits[0]]
