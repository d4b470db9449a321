"""`PeftMixedModel`: this method beside LoRA and PEFT's others on one model.

PEFT keeps what a mixed model takes in closed lists, and the tuner there asks a method for its layers only. So this
adds the method to the lists, and for our configurations the tuner also does what `SubspaceModel` does before a module
is replaced.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Union

import peft.tuners.mixed as package
from peft.config import PeftConfig
from peft.tuners.mixed import MixedModel
from peft.tuners.mixed import model as module
from torch import nn

from .config import SubspaceConfig
from .injection import fill_target_modules, make_plan
from .layer import SubspaceLayer
from .model import SubspaceModel
from .registration import PREFIX, SUBSPACE
from .targets import target_names

LISTS = ("COMPATIBLE_TUNER_TYPES", "PREFIXES", "Configs", "Layers")
OUTER = "base_model.model."  # where a `PeftMixedModel` has the base model


def join_mixed_models() -> bool:
    """Have PEFT's mixed model take this method. Idempotent.

    False: this PEFT has not the lists that there are to join. Nothing is changed then, and its mixed model refuses the
    method in its own words.
    """
    if not all(hasattr(module, name) for name in LISTS):
        return False
    if SUBSPACE in module.COMPATIBLE_TUNER_TYPES:
        return True
    # `PeftMixedModel` reads them from the package, its tuner from the module
    package.COMPATIBLE_TUNER_TYPES = module.COMPATIBLE_TUNER_TYPES = (*module.COMPATIBLE_TUNER_TYPES, SUBSPACE)
    module.PREFIXES.append(PREFIX)
    module.Layers = (*module.Layers, SubspaceLayer)
    module.Configs = Union[module.Configs, SubspaceConfig]  # noqa: UP007 - PEFT asks for its __args__
    for ours in (_prepare_adapter_config, _prepare_model, _create_and_replace):
        _put_before(ours)
    return True


def _put_before(ours: Callable[..., Any]) -> None:
    """Let `MixedModel` call `ours`, which gets the method that it takes the place of, where the configuration is
    ours."""
    stored = inspect.getattr_static(MixedModel, ours.__name__)

    @functools.wraps(getattr(MixedModel, ours.__name__))
    def method(self: MixedModel, config: PeftConfig, *args: Any, **kwargs: Any) -> Any:
        theirs = stored.__get__(self, type(self))
        if isinstance(config, SubspaceConfig):
            return ours(self, theirs, config, *args, **kwargs)
        return theirs(config, *args, **kwargs)

    setattr(MixedModel, ours.__name__, method)


def _prepare_adapter_config(
    tuner: MixedModel, theirs: Callable[..., Any], config: SubspaceConfig, model_config: dict[str, Any]
) -> Any:
    fill_target_modules(config, tuner.model)
    return theirs(config, model_config)


def _prepare_model(tuner: MixedModel, theirs: Callable[..., Any], config: SubspaceConfig, model: nn.Module) -> None:
    theirs(config, model)
    # a second adapter is put into the mixed model as a whole, so that all names begin with where its base model is;
    # the basis and the task's file have them without
    targets = [name.removeprefix(OUTER) for name in target_names(model, config)]
    if targets:
        config._plan = make_plan(tuner.model, config, targets)


def _create_and_replace(
    tuner: MixedModel, theirs: Callable[..., Any], config: SubspaceConfig, *args: Any, current_key: str, **kwargs: Any
) -> None:
    # unbound: PEFT's own methods lend theirs to its mixed tuner in the same way
    SubspaceModel._create_and_replace(tuner, config, *args, current_key=current_key.removeprefix(OUTER), **kwargs)  # type: ignore[arg-type]
