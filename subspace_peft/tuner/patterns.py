"""Patterns of module names, as in PEFT's ``rank_pattern``, that give a value to each of some modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")


def exact_pattern(values: Mapping[str, Value], default: Value | None = None) -> dict[str, Value]:
    """Return the pattern that gives each module its value, where all others have the default.

    A name stands for every module that ends with it, and the first one that fits counts. So longer names come first,
    and a module at the default is named too where a shorter name is its end.

    Args:
        values: module → value.
        default: what the modules have that the pattern does not name.
    """
    others = [name for name in values if values[name] != default]
    fits = re.compile("|".join(rf"(?:.*\.)?(?:{_pattern(name)})" for name in others))
    named = [name for name in values if others and fits.fullmatch(name)]
    # a dot of a pattern fits any character: of one length, those with fewer dots first
    named.sort(key=lambda name: (-len(name), name.count(".")))
    return {_pattern(name): values[name] for name in named}


def _pattern(name: str) -> str:
    return name if re.fullmatch(r"[\w.]+", name) else re.escape(name)
