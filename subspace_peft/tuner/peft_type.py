"""The method's name, its prefix and its member of PEFT's enum: the ground that everything else in here stands on."""

from __future__ import annotations

from peft.utils import PeftType

NAME = "SUBSPACE"
PREFIX = "subspace_"


def extend_peft_type(name: str = NAME) -> PeftType:
    """Return the member of PEFT's enum for this method; make it on the first call.

    Enums are closed, so this does by hand what their metaclass does; `list`, `in`, lookups, pickling, copying and JSON
    then see a member like any other. Seen to work with PEFT 0.21.0 to 0.21.2 and Python 3.10 to 3.13.
    """
    if name in PeftType.__members__:
        return PeftType.__members__[name]
    # name and value are one text: PEFT's mappings are indexed with plain strings, and an enum hashes its name
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    getattr(PeftType, "_hashable_values_", []).append(name)
    # a bare pickled member imports this package, which registers the method, where it is loaded
    member.__reduce_ex__ = lambda protocol: (extend_peft_type, (name,))  # type: ignore[method-assign]
    return member


SUBSPACE = extend_peft_type()
