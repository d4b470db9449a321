"""Replace a loaded task by another one in place, so that a compiled model stays compiled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from torch import nn

from .._adapted import unwrapped
from ..basis.module_names import plain_name
from ..errors import BasisMismatchError, SubspaceError
from ..tuner.base_check import require_same_base
from ..tuner.config import SubspaceConfig
from ..tuner.layer import SubspaceLayer, require_loaded
from ..tuner.module_names import base_model_of, rename_keys, rename_saved
from ..tuner.renaming import follow_model, named_as
from ..tuner.row_context import CHANGES
from ..tuner.task_file import BASIS_KEY, weights_of
from .arguments import check_hub

MARK = ".subspace_coef."  # between a module's name and that of a coefficient
# the fields of the configuration that two tasks share where one can take the other's place
SAME = (
    "basis_fingerprint",
    "coefficients",
    "k",
    "rank_pattern",
    "r",
    "alpha",
    "mean_gain",
    "dropout",
    "extra_rank",
    "extra_rank_pattern",
)
# those of them that say how many directions each module has, as others may say it too
SIZED = ("k", "rank_pattern", "extra_rank", "extra_rank_pattern")


def hotswap(model: nn.Module, task: str | Path, adapter: str = "default", **hub: Any) -> None:
    """Replace the loaded `adapter` by the saved `task`, under the adapter's name.

    The task's parameters are copied into the adapter's tensors. No tensor is replaced, nor anything else that a
    compiler guards on, so a compiled model is not compiled again.

    Args:
        model: A PeftModel, or a model adapted by `inject_adapter_in_model` or by transformers; also the result of
            `torch.compile`.
        task: Folder or Hub id of a saved task on the same basis, with the same kind and number of coefficients and of
            own directions, for the same modules.
        adapter: The adapter to replace.
        **hub: `revision`, `token`, `cache_dir` and `subfolder` of a task on the Hub.

    Raises:
        SubspaceError: There is no such adapter, or it is merged. The model is as it was.
        BasisMismatchError: The tasks differ in more than their parameters' values. The model is as it was.
        BadFileError: See `SubspaceConfig.from_pretrained`.
    """
    inner = unwrapped(model)
    configs: Mapping[str, Any] = getattr(inner, "peft_config", {})
    old = configs.get(adapter)
    if not isinstance(old, SubspaceConfig):
        raise SubspaceError(f"There is no subspace adapter {adapter!r}; there are {', '.join(configs) or 'none'}.")
    check_hub(str(task), hub)
    new = SubspaceConfig.from_pretrained(str(task), **hub)
    if not isinstance(new, SubspaceConfig):
        raise SubspaceError(f"{task} is not a saved subspace task.")
    _check_alike(task, adapter, new, old, [name for name in SAME if name not in SIZED])
    require_same_base(new, old, f"The task {task}")
    rename_saved(new, inner)
    follow_model(new, base_model_of(inner))
    if not _of_one_size(new, old):
        _check_alike(task, adapter, new, old, SIZED)
    targets = _targets(inner, adapter)
    require_loaded(inner, adapter)
    found: dict[str, torch.Tensor] = {}
    for key, value in load_file(weights_of(task, new.loaded_from.folder)).items():
        # a basis that the task carries is the one that is loaded: both have its fingerprint
        if not BASIS_KEY.match(key):
            found[_plain(key)] = value
    found = _as_named_in(targets, rename_keys(inner, found))
    absent, extra = sorted(targets.keys() - found.keys()), sorted(found.keys() - targets.keys())
    if absent or extra:
        what = f"lacks {absent[0]}" if absent else f"also has {extra[0]}"
        raise BasisMismatchError(
            f"{task} {what}, unlike adapter {adapter!r}: they cannot be swapped in place. Load it beside the other"
            " with `model.load_adapter`."
        )
    for key, value in found.items():
        if value.shape != targets[key].shape:
            raise BasisMismatchError(
                f"{task}: {key} has shape {tuple(value.shape)}, that of adapter {adapter!r}"
                f" {tuple(targets[key].shape)}."
            )
    with CHANGES, torch.no_grad():
        for key, value in found.items():
            targets[key].copy_(value)
        for module in inner.modules():
            if "row_slot" in module.__dict__:
                module.row_slot.swaps += 1
            if isinstance(module, SubspaceLayer):
                # what was a new task, of which more would be said at its first forward pass, is the saved one now
                module.load_trackers.pop(adapter, None)
    new.basis_names = old.basis_names
    configs[adapter] = new  # type: ignore[index]


def _check_alike(
    task: str | Path, adapter: str, new: SubspaceConfig, old: SubspaceConfig, names: Iterable[str]
) -> None:
    for name in names:
        if getattr(old, name) != getattr(new, name):
            raise BasisMismatchError(
                f"{task}: its {name} is {getattr(new, name)!r}, that of adapter {adapter!r} {getattr(old, name)!r}:"
                " they cannot be swapped in place. Load it beside the other with `model.load_adapter`."
            )


def _of_one_size(new: SubspaceConfig, old: SubspaceConfig) -> bool:
    """Tell whether two tasks have as many directions in every module, whichever fields of theirs say so."""
    shapes = (new.loaded_from.modules if new.loaded_from is not None else None) or {}
    return all(
        new.sizes.used(name, shape["k_out"], shape["k_in"]) == old.sizes.used(name, shape["k_out"], shape["k_in"])
        and new.sizes.extra_of(name, shape) == old.sizes.extra_of(name, shape)
        for name, shape in shapes.items()
    )


def _as_named_in(targets: Iterable[str], found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a task's tensors by the adapter's keys, where another head puts another prefix before the backbone."""
    layers = dict.fromkeys(stem for key in targets if (stem := key.rpartition(MARK)[0]))
    stems = dict.fromkeys(stem for key in found if (stem := key.rpartition(MARK)[0]))
    now = {old: new for new, old in named_as(layers, {stem: stem for stem in stems}).items()}
    return {_moved(key, now): value for key, value in found.items()}


def _moved(key: str, now: Mapping[str, str]) -> str:
    stem, mark, rest = key.rpartition(MARK)
    return f"{now.get(stem, stem)}{mark}{rest}"


def _plain(key: str) -> str:
    return plain_name(key)


def _targets(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """Return the tensors of `adapter` in the model, by the key that each has in a task's file."""
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        plain = _plain(name)
        if isinstance(module, SubspaceLayer) and adapter in module.subspace_coef:
            if adapter in module.merged_adapters:
                raise SubspaceError(f"Adapter {adapter!r} is merged into the base weights: unmerge it first.")
            coefficients = module.subspace_coef[adapter]
            found |= {f"{plain}.subspace_coef.{key}": value for key, value in coefficients.named_parameters()}
        elif isinstance(module, AuxiliaryTrainingWrapper) and adapter in module._adapters:
            state = module.adapter_state_dict(adapter, module.state_dict())
            found |= {f"{plain}.{key}": value for key, value in state.items()}
    return found
