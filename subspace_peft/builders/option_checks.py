"""How an option is defined: its default, help text and flag, and the checks of its value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any

from ..errors import SubspaceError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
SIZE = re.compile(r"\s*(?P<number>\d+(\.\d+)?)\s*(?P<unit>[kmgt]i?)?b?\s*", re.IGNORECASE)

Check = Callable[[str, Any], None]


def number(text: str) -> int | float:
    """Read a whole number, or else a finite decimal one.

    Raises:
        SubspaceError: the text is neither.
    """
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        if math.isfinite(value):
            return value
    raise SubspaceError(f"{text!r} is no number.")


# accelerate's `convert_file_size_to_int` knows neither "1.5g" nor "1TiB" nor "2000000", reads "2Gb" as bits, and takes
# half a second to import beyond torch
def parse_size(size: int | str) -> int:
    """Return a size such as ``2GB``, ``512MiB`` or ``1.5g`` in bytes.

    Args:
        size: a number of bytes, or a text of a number and a unit; case and spaces do not matter.

    Raises:
        SubspaceError: it is no size above 0.
    """
    found = SIZE.fullmatch(str(size)) if not isinstance(size, bool) else None
    count = int(float(found["number"]) * UNITS[(found["unit"] or "").lower()]) if found else 0
    if count <= 0:
        raise SubspaceError(f"max_memory={size!r} is no size: give one like '2GB', '512MiB', or a number of bytes.")
    return count


def option(
    default: Any,
    help: str,
    check: Check,
    *,
    flags: Sequence[str] | None = None,
    convert: Callable[[str], Any] = str,
    **shown: Any,
) -> Any:
    """Define one option of a dataclass.

    Args:
        default: the value where none is given.
        help: the text of the command line's ``--help``; ``{default}`` stands for the default.
        check: called with the option's name and value; raises `SubspaceError`.
        flags: on the command line; by default the name, as ``--the-name``; empty: the option has no flag.
        convert: from the command line's text to the value.
        shown: what argparse's `add_argument` takes beside (``choices``, ``metavar``, ``action``, …).
    """
    facts = {"help": help, "check": check, "flags": flags, "convert": convert, "shown": shown}
    return field(default=default, metadata=facts)


def whole(least: int | None = None, *, optional: bool = False) -> Check:
    """Return a check for whole numbers from `least` on; where `optional`, None passes."""

    def check(name: str, value: Any) -> None:
        if value is None and optional:
            return
        if not is_whole_number(value) or (least is not None and value < least):
            bound = "" if least is None else f", at least {least}"
            raise SubspaceError(f"{name}={value!r}: give a whole number{bound}.")

    return check


def directions_or_share(name: str, value: Any) -> None:
    """Raise `SubspaceError` unless the value is a number of directions from 1 on, or a share of energy in (0, 1)."""
    share = isinstance(value, float) and 0 < value < 1
    if not share and not (is_whole_number(value) and value >= 1):
        raise SubspaceError(
            f"{name}={value!r}: give a number of directions (1, 2, …) or a share of energy to keep (0.5)."
        )


def one_of(*choices: str, optional: bool = False) -> Check:
    """Return a check for a few words; where `optional`, None passes."""

    def check(name: str, value: Any) -> None:
        if not (value is None and optional) and value not in choices:
            raise SubspaceError(f"{name}={value!r}: there is no such choice; choose one of {', '.join(choices)}.")

    return check


def truth(name: str, value: Any) -> None:
    """Raise `SubspaceError` unless the value is True or False."""
    if not isinstance(value, bool):
        raise SubspaceError(f"{name}={value!r}: give True or False.")


def truth_or_none(name: str, value: Any) -> None:
    """Raise `SubspaceError` unless the value is True, False or None."""
    if value is not None:
        truth(name, value)


def names_or_none(name: str, value: Any) -> None:
    """Raise `SubspaceError` unless the value is a text, texts or None."""
    several = not isinstance(value, str) and isinstance(value, (Sequence, set, frozenset))
    if value is None or isinstance(value, str) or (several and all(isinstance(each, str) for each in value)):
        return
    raise SubspaceError(f"{name}={value!r}: give names of modules, or a regular expression.")


def weights_or_file(name: str, value: Any) -> None:
    """Raise `SubspaceError` unless the value is a word, a file or a mapping, each of which is read later."""
    if not isinstance(value, (str, Path, Mapping)):
        raise SubspaceError(f"{name}={value!r}: give equal, norm, or numbers by source (or a JSON file of them).")


def anything(name: str, value: Any) -> None:
    """Accept every value: it is checked where it is used."""


def is_whole_number(value: Any) -> bool:
    """Return whether the value is an integer; booleans are none."""
    return isinstance(value, int) and not isinstance(value, bool)


class Options:
    """Base of the dataclasses below: checks every field as its definition says."""

    def __post_init__(self) -> None:
        for each in fields(self):  # type: ignore[arg-type]
            each.metadata["check"](each.name, getattr(self, each.name))

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of all options, in order."""
        return [each.name for each in fields(cls)]  # type: ignore[arg-type]

    def changed(self) -> list[str]:
        """Return the names of the options that are not at their defaults."""
        return [each.name for each in fields(self) if getattr(self, each.name) != each.default]  # type: ignore[arg-type]
