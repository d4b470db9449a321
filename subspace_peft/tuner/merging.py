"""A new task as a weighted combination of loaded ones on one basis, in the space of their cores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties

from .._io.warn import warn_caller
from ..errors import BasisMismatchError, SubspaceError
from .combined_own import Update, cut, side_by_side
from .config import SubspaceConfig
from .layer import SubspaceLayer, require_loaded
from .own_directions import own_fields, own_tensors

EXACT = ("linear", "cat")  # in LoRA `cat` is the exact sum; on one basis the plain one is exact already
PRUNED = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
TYPES = (*EXACT, *PRUNED, "svd", *(f"{name}_svd" for name in PRUNED))


@torch.no_grad()
def add_weighted(
    tuner: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    *,
    combination_type: str,
    svd_rank: int | None,
    density: float | None,
    majority_sign_method: str,
) -> None:
    """See `SubspaceModel.add_weighted_adapter`."""
    configs = _checked(tuner, adapters, weights, adapter_name, combination_type, density)
    for name in adapters:
        require_loaded(tuner.model, name)
    small = combination_type.endswith("svd")
    kind = combination_type.removesuffix("_svd") if combination_type != "svd" else "linear"
    layers = [layer for layer in tuner.model.modules() if isinstance(layer, SubspaceLayer)]
    layers = [layer for layer in layers if any(name in layer.subspace_coef for name in adapters)]
    present = {name: [layer for layer in layers if name in layer.subspace_coef] for name in adapters}
    _say_unpruned(kind, present)
    held = [(layer, name) for name, found in present.items() for layer in found]
    rank = svd_rank or max(max(layer.r[name]) + layer.extra_rank.get(name, 0) for layer, name in held)
    largest = max(max(layer.r[name]) for layer, name in held)
    updates = {}
    for layer in layers:
        update = _update(layer, kind, dict(zip(adapters, weights, strict=True)), density, majority_sign_method)
        if small and update.own is not None:
            first = next(name for name in adapters if name in layer.subspace_coef)
            update = cut(update, layer.subspace_U[first], layer.subspace_V[first], rank)
        updates[layer.key] = update
    config = dataclasses.replace(
        configs[0],
        coefficients="factor" if small else "core",
        # a dense core has no rank of its own
        r=min(rank, largest) if small else SubspaceConfig.r,
        mean_gain="none",
        start="zero",
        target_modules=_united(configs),
        # a basis that only the tasks' files have is not looked for elsewhere: a layer shares it below
        subspace_version=configs[0].subspace_version if configs[0].basis_modules is not None else None,
        card=None,
        inference_mode=False,
        rank_pattern=dict(configs[0].rank_pattern),
        **own_fields({module: update.extra_rank for module, update in updates.items()}),
    )
    tuner.peft_config[adapter_name] = config
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
    except Exception:
        tuner.peft_config.pop(adapter_name, None)
        raise
    for layer in layers:
        if adapter_name in layer.subspace_coef:
            first = next(name for name in adapters if name in layer.subspace_coef)
            layer.share_basis(adapter_name, first)
            _fill(layer, adapter_name, updates[layer.key], config.alpha)


def _update(
    layer: SubspaceLayer, kind: str, weights: Mapping[str, float], density: float | None, majority: Any
) -> Update:
    """Return the combination in one layer, in units of ΔW."""
    names = [name for name in weights if name in layer.subspace_coef]
    cores = [layer._core(name).float() * layer.scaling[name] for name in names]
    given = torch.tensor([weights[name] for name in names], dtype=cores[0].dtype, device=cores[0].device)
    return Update(_combined(kind, cores, given, density, majority), side_by_side([*map(layer.own_part, names)], given))


def _fill(layer: SubspaceLayer, adapter: str, update: Update, alpha: float) -> None:
    coefficients = layer.subspace_coef[adapter]
    coefficients.start((update.core / layer.scaling[adapter]).float(), None)
    if update.own is not None:
        for name, value in own_tensors(*update.own, coefficients.extra_rank, layer.own_units(alpha)).items():
            getattr(coefficients, name).copy_(value)
    coefficients.requires_grad_(False)


def _say_unpruned(kind: str, present: Mapping[str, Sequence[SubspaceLayer]]) -> None:
    """Warn where adapters have own directions, which a pruning kind leaves whole."""
    own = [name for name, layers in present.items() if any(layer.extra_rank.get(name) for layer in layers)]
    if kind in PRUNED and own:
        warn_caller(
            f"{kind} compares and prunes entries that tasks share, which own directions are not: those of"
            f" {', '.join(own)} are added whole, with their weights. combination_type='svd' cuts them and the core to"
            " the best rank together."
        )


def _combined(
    kind: str, cores: list[torch.Tensor], weights: torch.Tensor, density: float | None, majority: Any
) -> torch.Tensor:
    if kind in EXACT:
        return task_arithmetic(cores, weights)
    if kind == "ties":
        return ties(cores, weights, density, majority)
    if kind == "dare_ties":
        return dare_ties(cores, weights, density, majority)
    return {"dare_linear": dare_linear, "magnitude_prune": magnitude_prune}[kind](cores, weights, density)


def _checked(
    tuner: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    kind: str,
    density: float | None,
) -> list[SubspaceConfig]:
    if kind not in TYPES:
        raise SubspaceError(f"There is no combination_type {kind!r}; choose one of {', '.join(TYPES)}.")
    if not adapters or len(adapters) != len(weights):
        raise SubspaceError(
            f"{len(adapters)} adapters and {len(weights)} weights: give as many of each, at least one."
        )
    if unknown := [name for name in adapters if name not in tuner.peft_config]:
        raise SubspaceError(f"There is no adapter {', '.join(unknown)}; there are {', '.join(tuner.peft_config)}.")
    if adapter_name in tuner.peft_config:
        raise SubspaceError(f"There is an adapter {adapter_name!r} already: delete it first, or choose another name.")
    if kind.removesuffix("_svd") in PRUNED and not (density is not None and 0 <= density <= 1):
        raise SubspaceError(f"combination_type={kind!r} needs a density from 0 to 1, got {density!r}.")
    configs = [tuner.peft_config[name] for name in adapters]
    for name, config in zip(adapters, configs, strict=True):
        for field in ("basis_fingerprint", "k", "rank_pattern"):
            mine, first = getattr(config, field), getattr(configs[0], field)
            if mine != first:
                raise BasisMismatchError(
                    f"Adapters {adapters[0]!r} and {name!r} differ in their {field} ({first!r}, {mine!r}), so their"
                    " cores cannot be added. Export both with `export_lora` and merge the LoRAs, or project them on"
                    " one basis first."
                )
    return configs


def _united(configs: Sequence[SubspaceConfig]) -> Any:
    targets = [config.target_modules for config in configs]
    if all(isinstance(names, (set, list, tuple)) for names in targets):
        return set().union(*targets)
    if any(names != targets[0] for names in targets):
        raise SubspaceError(
            "The adapters' target_modules are different regular expressions. Load them from saved tasks whose modules"
            " are named."
        )
    return targets[0]
