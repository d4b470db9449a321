"""What a learner is given, checked before anything is written: the tasks' configuration, the Trainer's keywords."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import Trainer

from ..basis import SubspaceBasis
from ..errors import SubspaceError
from ..tuner import SubspaceConfig
from ..tuner.base_weights import model_name
from ..tuner.injection import fill_target_modules, make_plan
from ..tuner.targets import target_names
from .options import ContinualOptions
from .training import check_unadapted

# what the learner gives to the Trainer
OWN = ("self", "model", "args", "train_dataset", "eval_dataset", "compute_metrics", "model_init")


def template(config: SubspaceConfig | None) -> SubspaceConfig:
    """Return the configuration that tasks are made from.

    Raises:
        SubspaceError: it has what the learner sets.
    """
    if config is None:
        return SubspaceConfig()
    if not isinstance(config, SubspaceConfig):
        raise SubspaceError(f"config is a {type(config).__name__}: give a SubspaceConfig, or leave it out.")
    for name, empty in (("basis", None), ("extra_rank", 0)):
        if getattr(config, name) != empty:
            raise SubspaceError(
                f"config has {name}={getattr(config, name)!r}, which the learner sets: give the basis to the learner,"
                " and extra_rank to its options."
            )
    return config


def check_pattern(config: SubspaceConfig, options: ContinualOptions) -> None:
    """Check that a configuration does not ask for own directions that no task of a run gets.

    Raises:
        SubspaceError: its pattern does, and the options say that tasks have none.
    """
    if (options.probe == "never" or not options.extra_rank) and any((config.extra_rank_pattern or {}).values()):
        raise SubspaceError(
            f"config has extra_rank_pattern={config.extra_rank_pattern!r}, and no task gets own directions with"
            f" probe={options.probe!r}, extra_rank={options.extra_rank} in the options. Leave the pattern out, or let"
            " the options give own directions: extra_rank of 1 or more with probe='auto' or 'always'."
        )


def checked_options(options: ContinualOptions | None) -> ContinualOptions:
    """Return the options, or the usual ones for None.

    Raises:
        SubspaceError: they are of another kind.
    """
    if options is None:
        return ContinualOptions()
    if not isinstance(options, ContinualOptions):
        raise SubspaceError(f"options is a {type(options).__name__}: give ContinualOptions, or leave it out.")
    return options


def check_trainer(given: Mapping[str, Any]) -> None:
    """Check the further keywords of a learner, which the Trainer gets.

    Raises:
        SubspaceError: the Trainer has none of that name, or the learner sets it.
    """
    known = [name for name in inspect.signature(Trainer.__init__).parameters if name not in OWN]
    if unknown := [name for name in given if name not in known]:
        raise SubspaceError(
            f"{unknown[0]}= is no argument of the learner, and none that it passes to the Trainer, which are"
            f" {', '.join(known)}. Leave it out."
        )


def check_model(model: nn.Module, basis: SubspaceBasis, config: SubspaceConfig) -> None:
    """Check that tasks on a basis can be made of a base model, which stays as it is.

    Raises:
        SubspaceError: it has adapters or is spread over devices, or its modules are not the basis's.
    """
    check_unadapted(model)
    trial = replace(config, basis=basis)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said where the first task is made
        found = fill_target_modules(trial, model)
        if targets := target_names(model, trial):
            make_plan(model, trial, targets, found)
            return
    raise SubspaceError(
        f"config: target_modules={config.target_modules!r} names no module of {type(model).__name__}. Name some of the"
        " basis's modules, or leave it out for all of them."
    )


def settings_of(model: Any, config: SubspaceConfig, options: ContinualOptions) -> dict[str, Any]:
    """Return what a run's journal records of how it was begun, but for the basis."""
    plain = SubspaceConfig().to_dict()
    fixed = {name: value for name, value in config.to_dict().items() if plain.get(name) != value and name != "card"}
    return {
        "base_model": model_name(model) if isinstance(model, nn.Module) else None,
        "config": fixed,
        "options": options.record(),
    }
