"""Hold the module names that a user gave against the model: a misspelt one beside right ones would do nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ..basis.module_store import near_names
from ..errors import SubspaceError
from .config import SubspaceConfig
from .targets import outer_modules

# PEFT adds these by itself for its task types, whichever of them the model has
HEADS = ("classifier", "score", "qa_outputs")


def check_given_names(model: nn.Module, config: SubspaceConfig) -> None:
    """Check the names and layers that a new adapter's configuration lists.

    Those of a saved task were checked when it was made.

    Args:
        model: the base model.
        config: the adapter's configuration, with the targets as the user gave them.

    Raises:
        SubspaceError: entries that match nothing in the model, or that another field overrules; lists all.
    """
    names = [name.removeprefix("base_model.model.") for name, _ in outer_modules(model) if name]
    problems: list[str] = []
    for field in ("target_modules", "exclude_modules"):
        problems += _unmatched(field, getattr(config, field), names)
    heads = [name for name in config.modules_to_save or () if name not in HEADS]
    problems += _unmatched("modules_to_save", heads, names, loosely=True)
    problems += _layer_problems(config, names)
    if problems:
        raise SubspaceError(f"{'. '.join(problems)}.")


def _unmatched(field: str, given: Any, names: Collection[str], *, loosely: bool = False) -> list[str]:
    if given is None or isinstance(given, str):
        # PEFT refuses an expression that matches nothing
        return []
    known = set(names)
    ends = tuple(names)
    wrong = [
        entry
        for entry in sorted(given)
        if entry not in known and not any(name.endswith(entry if loosely else f".{entry}") for name in ends)
    ]
    return [f"{field}: there is no module {entry!r} in the model{_meant(entry, names)}" for entry in wrong]


def _meant(entry: str, names: Iterable[str]) -> str:
    """Return a hint at the names, cut to as many parts as `entry` has, that it may have been meant for."""
    parts = entry.count(".") + 1
    near = near_names(entry, sorted({".".join(name.split(".")[-parts:]) for name in names}))
    return f" (near it: {', '.join(near)})" if near else ""


def _layer_problems(config: SubspaceConfig, names: Collection[str]) -> list[str]:
    if config.layers_to_transform is None:
        return []
    if isinstance(config.target_modules, str):
        return [
            f"layers_to_transform={config.layers_to_transform!r} has no effect where target_modules is one expression"
            " or 'all-linear': name the layers in the expression, or list the ends of modules' names"
        ]
    listed = set(config.target_modules or ())
    whole = sorted(listed & set(names))
    if whole:
        return [
            f"layers_to_transform={config.layers_to_transform!r} has no effect on modules named in full, such as"
            f" {whole[0]!r}: give the ends of their names, or leave layers_to_transform out"
        ]
    given = config.layers_to_transform
    layers = [given] if isinstance(given, int) else list(given)
    ends = tuple(f".{name}" for name in listed)
    candidates = [name for name in names if "." in name and (not ends or name.endswith(ends))]
    absent = [layer for layer in layers if not _any_in_layer(config, layer, candidates)]
    if not absent:
        return []
    there = "" if config.layers_pattern is None else f" (layers_pattern={config.layers_pattern!r})"
    return [f"layers_to_transform: the model has no targets in layer {', '.join(map(str, absent))}{there}"]


def _any_in_layer(config: SubspaceConfig, layer: int, names: Iterable[str]) -> bool:
    rule = LoraConfig(target_modules=[""], layers_to_transform=[layer], layers_pattern=config.layers_pattern)
    for name in names:
        # one end at a time: PEFT's rule compares each name with all of them
        rule.target_modules = {name.rsplit(".", 1)[-1]}
        if check_target_module_exists(rule, name):
            return True
    return False
