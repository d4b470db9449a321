"""Builders that need no fleet: `random` and `base-weights`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..basis import ModuleBasis, SubspaceBasis
from ..basis.controls import base_weight_module, random_module, with_random_directions
from ..basis.module_store import same_module
from ..errors import SubspaceError
from .fleet import gather


def build_control(
    builder: str,
    *,
    sources: Iterable[Any] | None,
    like: SubspaceBasis | None,
    base_model: nn.Module | None,
    target_modules: str | Sequence[str] | None,
    k: int | float,
    k_in: int | None,
    directions: int,
    seed: int,
    token: str | bool | None,
    progress: bool,
    allow_bin: bool,
    skip_bad: bool,
    arguments: dict[str, Any],
) -> SubspaceBasis:
    """A `random` or `base-weights` basis for the modules of `like`, of the sources, or of the base model.

    Raises:
        SubspaceError: nothing says which modules; or `base-weights` without a base model.
    """
    weights = linear_weights(base_model, target_modules) if base_model is not None else {}
    shapes: dict[str, tuple[int, int, int, int]] = {}
    base_name: str | None = getattr(getattr(base_model, "config", None), "_name_or_path", None) or None
    if like is not None:
        shapes = {name: (s["out"], s["in"], s["k_out"], s["k_in"]) for name, s in like.shapes().items()}
        base_name = like.base_model or base_name
    elif weights:
        shapes = {name: (*weight.shape, int(k), k_in or int(k)) for name, weight in weights.items()}
    elif sources is not None:
        fleet = gather(
            sources,
            skip_bad=skip_bad,
            partial=True,
            token=token,
            progress=progress,
            allow_bin=allow_bin,
            keep_duplicates=True,
        )
        base_name = fleet.base_model
        for source in fleet.sources:
            shapes |= {name: (*source.shape(name)[:2], int(k), k_in or int(k)) for name in source.keys}
    if not shapes:
        raise SubspaceError(
            f"The builder {builder!r} has to know which modules: pass sources, or like=basis (--like), or base_model= "
            "with target_modules= (--base-model, --target-modules)."
        )
    modules: dict[str, ModuleBasis] = {}
    for name, (out, inner, a, b) in tqdm(
        shapes.items(), desc=f"building ({builder})", unit="module", delay=2, disable=not progress
    ):
        if builder == "random":
            module = random_module(name, out, inner, a, b, seed)
        else:
            module = base_weight_module(_weight_for(name, weights, (out, inner)), max(a, b)).truncate(a, b)
        modules[name] = with_random_directions(name, module, directions, seed) if directions else module
    info = {"base_model_name_or_path": base_name, "builder": builder, "build": arguments, "sources": [], "skipped": []}
    return SubspaceBasis(modules, info)


def linear_weights(model: nn.Module, target_modules: str | Sequence[str] | None) -> dict[str, torch.Tensor]:
    """Weights (out, in) of a model's linear layers, and of `Conv1D` transposed, that `target_modules` names.

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
    return found


def _weight_for(name: str, weights: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
    hits = same_module(name, weights)
    if len(hits) != 1 or tuple(weights[hits[0]].shape) != shape:
        raise SubspaceError(
            f"Module {name!r} of shape {shape} is not among the base model's given target_modules. Pass the base model"
            " with base_model= and the same modules with target_modules=."
        )
    return weights[hits[0]]
