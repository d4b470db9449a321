"""What a model calls the modules of a basis or of a saved task, renames by transformers included."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel
from torch import nn

from .._adapted import unwrapped
from ..basis import SubspaceBasis
from ..basis.module_names import plain_name
from ..basis.module_store import same_module
from ..basis.renames import converted, table_of
from ..errors import BasisMismatchError
from .config import SubspaceConfig
from .patterns import exact_pattern
from .targets import outer_modules
from .task_file import BASIS_KEY, COEFFICIENT_KEY

OUTER = "base_model.model."  # PEFT's, before the names of a PeftModel's modules


def names_in_basis(
    model: nn.Module, basis: SubspaceBasis, names: Sequence[str], part: str | None = None
) -> dict[str, str | None]:
    """Return what the basis calls modules of a model.

    Args:
        model: the base model.
        basis: the basis.
        names: names of modules of the model.
        part: of a pipeline's basis the part that the model is; None: names tell.

    Returns:
        Name in the model → name in the basis; None where the basis has no such module.

    Raises:
        BasisMismatchError: several of the basis's modules match one of the model's.
    """
    found = {name: basis.find(name, part, converted=False) for name in names}
    left = set(basis) - set(found.values())
    if not left or None not in found.values():
        return found
    now = {new: old for old, new in converted(left, table_of(base_model_of(model)))[0].items()}
    for name in [name for name, key in found.items() if key is None] if now else ():
        hits = same_module(plain_name(name), now)
        if len(hits) == 1:
            found[name] = now[hits[0]]
    return found


def other_names(basis: SubspaceBasis, names: Mapping[str, str]) -> dict[str, str] | None:
    """Return those of `names`, a model's → the basis's, that the basis does not find by itself; None where it does."""
    plain = basis.named({})

    def told(name: str) -> str | None:
        try:
            return plain.find(name, converted=False)
        except BasisMismatchError:
            # modules of several parts of a pipeline have this name
            return None

    return {name: key for name, key in names.items() if told(name) != key} or None


def renamed_in(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return what `model` calls modules that transformers has renamed since: earlier name → name in the model.

    Names that the model has, and those that it has under no other name, are left out.
    """
    there = {plain_name(name): name for name, _ in outer_modules(model)}
    left = [name for name in names if plain_name(name) not in there]
    if not left:
        return {}
    renamed = converted(left, table_of(base_model_of(model)))[0]
    found = {}
    for old in left:
        hits = same_module(renamed[old], there) if old in renamed else []
        if len(hits) == 1:
            found[old] = there[hits[0]].removeprefix(OUTER)
    return found if len(set(found.values())) == len(found) else {}


def base_model_of(model: nn.Module) -> nn.Module:
    """Return the model that a PeftModel adapts, or the model itself, without wrappers around it."""
    model = unwrapped(model)
    return unwrapped(model.base_model.model) if isinstance(model, (PeftModel, PeftMixedModel)) else model


def as_named_in(model: nn.Module, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by the names that their modules have in `model`, where transformers has renamed them since."""
    found = renamed_in(model, values)
    return {found.get(name, name): value for name, value in values.items()}


def rename_saved(config: SubspaceConfig, model: nn.Module) -> None:
    """Let a saved task's configuration name the modules as `model` does, where transformers has renamed them since."""
    checked = None if config.loaded_from is None else config.loaded_from.modules
    listed = () if config.target_modules is None or isinstance(config.target_modules, str) else config.target_modules
    found = renamed_in(model, {*(checked or {}), *listed, *(config.basis_modules or {})})
    if not found:
        return

    def now(values: Mapping[str, object]) -> dict[str, object]:
        return {found.get(name, name): value for name, value in values.items()}

    if checked is not None and config.loaded_from is not None:
        config.loaded_from = replace(config.loaded_from, modules=now(checked))  # type: ignore[arg-type]
        # short names, or an expression, may mean others by now
        config.target_modules = {found.get(name, name) for name in checked}  # type: ignore[assignment]
    else:
        config.target_modules = {found.get(name, name) for name in listed} or None  # type: ignore[assignment]
    for name in ("basis_modules", "weight_shapes", "basis_names"):
        if (value := getattr(config, name)) is not None:
            setattr(config, name, now(value))
    keep_numbers(config, {name: found.get(name, name) for name in checked or listed})


def keep_numbers(config: SubspaceConfig, renamed: Mapping[str, str]) -> None:
    """Let the patterns of a configuration give modules by their new names what they gave them by the earlier ones.

    Args:
        config: changed where a pattern names a module by what it was called.
        renamed: earlier name of each of the task's modules → its name now.
    """
    sizes = config.sizes
    ks = {now: sizes.k_of(name) for name, now in renamed.items()}
    if any(sizes.k_of(now) != k for now, k in ks.items()):
        given = exact_pattern(ks, config.k)
        config.rank_pattern = {name: k for name, k in given.items() if k is not None}
    own = {now: sizes.extra_asked(name) for name, now in renamed.items()}
    if any(sizes.extra_asked(now) != rank for now, rank in own.items()):
        config.extra_rank_pattern = exact_pattern(own, config.extra_rank)


def rename_keys(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a task's tensors by the keys that they have in `model`, where transformers has renamed modules since.

    Args:
        model: the model, or a PeftModel of it.
        tensors: key → tensor, as a task's file has them.
    """
    matches = {key: COEFFICIENT_KEY.match(key) or BASIS_KEY.match(key) for key in tensors}
    found = renamed_in(model, {match["module"] for match in matches.values() if match is not None})
    made = {}
    for key, value in tensors.items():
        match = matches[key]
        now = None if match is None else found.get(match["module"])
        made[key if now is None else key.replace(match["module"], now, 1)] = value  # type: ignore[index]
    return made
