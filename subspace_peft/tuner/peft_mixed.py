"""`PeftMixedModel`: this method beside LoRA and PEFT's others on one model.

PEFT's mixed tuner asks a method for its layers only, so the steps of `SubspaceModel` before a module is replaced are
repeated here for our configurations. `_peft_hooks` puts these functions before the mixed tuner's own methods; each
gets the method whose place it takes as `theirs`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft.tuners.mixed import MixedModel
from torch import nn

from .bnb import keep_unpacked
from .config import SubspaceConfig
from .injection import fill_target_modules, make_plan
from .model import fill_in, put_in, with_default_targets
from .targets import target_names

OUTER = "base_model.model."  # where a `PeftMixedModel` has the base model


def prepare_adapter_config(
    tuner: MixedModel, theirs: Callable[..., Any], config: SubspaceConfig, model_config: dict[str, Any]
) -> Any:
    """Name the basis's own modules where the configuration names no targets."""
    fill_target_modules(config, tuner.model)
    return with_default_targets(config, lambda: theirs(config, model_config))


def prepare_model(tuner: MixedModel, theirs: Callable[..., Any], config: SubspaceConfig, model: nn.Module) -> None:
    """Plan the injection, and raise any error, before a module is replaced."""
    theirs(config, model)
    keep_unpacked(model)
    # a second adapter is put into the mixed model as a whole, so that all names begin with where its base model is;
    # the basis and the task's file have them without
    targets = [name.removeprefix(OUTER) for name in target_names(model, config)]
    tuner.subspace_plan = make_plan(tuner.model, config, targets) if targets else None
    if tuner.subspace_plan is not None:
        fill_in(config, tuner.subspace_plan)


def create_and_replace(
    tuner: MixedModel,
    theirs: Callable[..., Any],
    config: SubspaceConfig,
    adapter_name: str,
    target: nn.Module,
    target_name: str,
    parent: nn.Module,
    current_key: str,
    **given: Any,
) -> None:
    """Put the adapter's layer in the place of one module."""
    put_in(tuner, tuner.subspace_plan, adapter_name, target, target_name, parent, current_key.removeprefix(OUTER))
