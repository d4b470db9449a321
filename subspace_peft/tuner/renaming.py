"""Bring a loaded task's modules to the names that they have in the model that it is loaded into.

A task may have been saved with the names of wrappers (torch.compile's ``_orig_mod``), with a part of a pipeline in
front (``unet.``), or from a model whose head puts another prefix before the same backbone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..basis.module_names import plain_name, stored_name, unwrapped_in, unwrapped_name
from ..basis.module_store import same_module
from .config import NAMED, SubspaceConfig
from .module_names import keep_numbers, renamed_in
from .peft_type import PREFIX
from .targets import outer_modules, sizes, supported

COEFFICIENTS = f"{PREFIX}coef"  # where a layer of ours has them, by adapter


def new_names(saved: Iterable[str], own: Iterable[str]) -> dict[str, list[str]]:
    """Return saved module → the modules of a model that it may be: itself, or those with other leading parts.

    Wrappers' names count for nothing.

    Args:
        saved: names in a task.
        own: names in a model.
    """
    exact = set(own)
    plain: dict[str, list[str]] = {}
    for name in own:
        plain.setdefault(plain_name(name), []).append(name)
    return {
        name: [name]
        if name in exact
        else [each for hit in same_module(plain_name(name), plain) for each in plain[hit]]
        for name in saved
    }


def without_wrappers(config: SubspaceConfig) -> SubspaceConfig:
    """Return a configuration that calls its modules what the model itself, without wrappers, calls them."""
    fields = {name: getattr(config, name) for name in NAMED}
    plain = {name: unwrapped_in(value) for name, value in fields.items()}
    return config if plain == fields else replace(config, **plain)


def named_as(own: Iterable[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by the names that a model has for their modules; as they are where one cannot be told for certain.

    Args:
        own: names in the model.
        values: module → value.
    """
    found = {name: hits[0] for name, hits in new_names(values, list(own)).items() if len(hits) == 1}
    certain = len(found) == len(set(found.values())) == len(values)
    return {found[name]: value for name, value in values.items()} if certain else dict(values)


def names_in(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return module → its name in `model`, without wrappers; empty where one cannot be told for certain.

    Args:
        model: The model, or a PeftModel of it.
        names: Names of modules.
    """
    own = [plain_name(name) for name, module in outer_modules(model) if supported(module)]
    listed = list(names)
    found = {name: hits[0] for name, hits in new_names(dict.fromkeys(listed), own).items() if len(hits) == 1}
    if len(found) < len(listed):
        # checkpoints keep the names of earlier versions of transformers, and models do not
        renamed = renamed_in(model, listed)
        found = {name: renamed.get(name, name) for name in listed if renamed.get(name, name) in own}
    return found if len(found) == len(set(found.values())) == len(listed) else {}


def follow_model(config: SubspaceConfig, model: nn.Module) -> None:
    """Let a loaded task's configuration call its modules what `model` calls them.

    Nothing changes where the model has them all, or where one of them cannot be told for certain; the checks that
    follow then say what is absent.

    Args:
        config: of a task whose file was checked; others stay as they are.
        model: the base model.
    """
    origin = config.loaded_from
    if not config.loaded or origin is None or origin.modules is None:
        return
    modules = dict(outer_modules(model))
    if all(name in modules for name in origin.modules):
        return
    known = {name: module for name, module in modules.items() if supported(module)}
    found = new_names(origin.modules, known)
    renamed: dict[str, str] = {}
    for name, hits in found.items():
        shape = origin.modules[name]
        fits = [hit for hit in hits if sizes(known[hit]) == (shape["out"], shape["in"])]
        if len(fits) != 1 and len(hits) != 1:
            return
        renamed[name] = (fits or hits)[0]
    if max(Counter(renamed.values()).values()) > 1:
        return
    _rename(config, renamed)


def _rename(config: SubspaceConfig, renamed: Mapping[str, str]) -> None:
    origin = config.loaded_from
    assert origin is not None and origin.modules is not None
    config.target_modules = set(renamed.values())
    for key in ("basis_modules", "basis_names", "weight_shapes"):
        if (value := getattr(config, key)) is not None:
            setattr(config, key, {renamed.get(name, name): entry for name, entry in value.items()})
    modules = {renamed[name]: shape for name, shape in origin.modules.items()}
    config.loaded_from = replace(origin, modules=modules, renamed={**(origin.renamed or {}), **renamed})
    keep_numbers(config, renamed)


def by_layer_names(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a model's tensors by the names that its layers have, by which PEFT looks for them.

    FSDP and activation checkpointing leave their names out of a state dict.
    """
    layers = {
        # PEFT itself leaves this one out
        stored_name(name): name.removeprefix("_fsdp_wrapped_module.")
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and stored_name(name) != name
    }
    made = {}
    for key, value in state.items():
        stem, mark, rest = key.rpartition(f".{PREFIX}")
        made[f"{layers.get(stem, stem)}{mark}{rest}"] = value
    return made


def by_head_names(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a task's tensors with those of modules that are trained whole by the names that these have in the model.

    PEFT looks for them there, and a task is saved without the names of wrappers.
    """
    heads = {
        unwrapped_name(name): name
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    }
    made = {}
    for key, value in state.items():
        plain = unwrapped_name(key)
        head = next((head for head in heads if plain.startswith(f"{head}.")), None)
        made[key if head is None else heads[head] + plain[len(head) :]] = value
    return made


def under_model_names(
    model: nn.Module, config: SubspaceConfig, adapter_name: str, state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return a task's tensors under the names that their layers have in the model, those of wrappers left out.

    Where the model's state dict has other names than its layers, as FSDP and activation checkpointing have it, the
    key is the state dict's, the adapter's name in it.

    Args:
        model: a PeftModel, or another model that has the adapter's layers.
        config: the adapter's.
        adapter_name: its name.
        state: its tensors as they were saved.
    """
    own = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and adapter_name in getattr(layer, COEFFICIENTS, ())
    ]
    mark = f".{PREFIX}"
    stems = {key: key.rpartition(mark)[0] for key in state if mark in key}
    known = dict((config.loaded_from.renamed or {}) if config.loaded_from is not None else {})
    by_plain = {plain_name(name): name for name in own}
    hits = new_names(dict.fromkeys(stems.values()), own)
    for stem in hits:
        target = known.get(plain_name(stem)) or known.get(stem.removeprefix("base_model.model."))
        if target is not None and (place := by_plain.get(plain_name(target))) is not None:
            hits[stem] = [place]
    found = {}
    for key, value in state.items():
        stem = stems.get(key)
        places = hits[stem] if stem is not None else []
        if stem is None or len(places) != 1:
            found[key] = value
        elif (stored := stored_name(places[0])) != places[0]:
            kind, dot, rest = key[len(stem) + 1 :].partition(".")
            found[f"{stored}.{kind}.{adapter_name}{dot}{rest}"] = value
        else:
            found[unwrapped_name(places[0]) + key[len(stem) :]] = value
    return found
