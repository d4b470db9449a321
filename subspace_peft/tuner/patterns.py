"""Patterns of module names, as in PEFT's ``rank_pattern``, that give a value to each of some modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from peft.utils.other import get_pattern_key

Value = TypeVar("Value")


def exact_pattern(values: Mapping[str, Value], default: Value | None = None) -> dict[str, Value]:
    """Return the pattern that gives each module its value, where all others have the default.

    A name stands for every module that ends with it, and the first one that fits counts. So longer names come first,
    and a module at the default is named too where a shorter name is its end.

    Args:
        values: module → value.
        default: what the modules have that the pattern does not name.
    """
    longest = sorted(values, key=len, reverse=True)
    named = {name: values[name] for name in longest if values[name] != default}
    caught = {name for name in longest if name not in named and get_pattern_key(named, name) != name}
    return {name: values[name] for name in longest if name in named or name in caught}
