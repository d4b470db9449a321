"""A real `PeftType.SUBSPACE` member, and PEFT's own registration."""

from __future__ import annotations

import peft.helpers
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK
from peft.utils.peft_types import register_peft_method

NAME = "SUBSPACE"
PREFIX = "subspace_"


def extend_peft_type(name: str = NAME) -> PeftType:
    """The member of PEFT's enum for this method, made on the first call. Enums are closed, so this does by hand what
    their metaclass does; `list`, `in`, lookups, pickling, copying and JSON then see a member like any other."""
    if name in PeftType.__members__:
        return PeftType.__members__[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    getattr(PeftType, "_hashable_values_", []).append(name)
    # a bare pickled member imports this module, and so registers, where it is loaded
    member.__reduce_ex__ = lambda protocol: (extend_peft_type, (name,))  # type: ignore[method-assign]
    return member


SUBSPACE = extend_peft_type()


def register() -> None:
    """Register the method with PEFT. Idempotent.

    Raises:
        RuntimeError: PEFT, or another plugin, has a method of this name or prefix already.
    """
    from .config import SubspaceConfig
    from .model import SubspaceModel

    known = PEFT_TYPE_TO_TUNER_MAPPING.get(SUBSPACE)
    if known is SubspaceModel:
        return
    if known is not None or PREFIX in PEFT_TYPE_TO_PREFIX_MAPPING.values():
        raise RuntimeError(
            f"PEFT already has a method named {NAME} or with prefix {PREFIX!r} ({known}). Another plugin, or a newer"
            " PEFT, took the name: upgrade subspace-peft."
        )
    from ..tasks.hotswap import SAME
    from ..tasks.push import teach_push_to_hub
    from .card import teach_cards
    from .layer import SubspaceLayer
    from .peft_mixed import join_mixed_models

    CONFIG_KEYS_TO_CHECK[SUBSPACE] = list(SAME)
    teach_push_to_hub()
    teach_cards()
    register_peft_method(
        name="subspace",
        config_cls=SubspaceConfig,
        model_cls=SubspaceModel,
        prefix=PREFIX,
        is_mixed_compatible=join_mixed_models(),
    )
    # `rescale_adapter_scale` asks each module for this, by `isinstance`, and then needs no more than its `scaling`
    if isinstance(vars(peft.helpers).get("LoraLayer"), type):
        peft.helpers.LoraLayer = (peft.helpers.LoraLayer, SubspaceLayer)
