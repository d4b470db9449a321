"""Patterns of module names, as in PEFT's ``rank_pattern``, that give a value to each of some modules."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from ..basis.module_names import plain_patterns, unwrapped_name

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


def pattern_for(patterns: Iterable[str], name: str) -> str | None:
    """Return the first of some patterns that names a module, as in PEFT, or None.

    Names of wrappers count in neither: a task is saved without them, and means the same modules then.

    Args:
        patterns: ends of names, or regular expressions for them.
        name: the module.
    """
    if not patterns:
        return None
    plain = unwrapped_name(name)
    # a name that is no expression for itself names its module all the same
    return next((each for each in patterns if each in (name, plain) or _compiled(each).fullmatch(plain)), None)


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile("|".join(rf"(?:.*\.)?(?:{each})" for each in plain_patterns(pattern)))
