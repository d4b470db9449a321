"""How an option is defined: its default, help text and flag, and the checks of its value."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field, fields
from numbers import Real
from pathlib import Path
from typing import Any

from .._shown import Shown, short
from ..base_names import check_said
from ..errors import SubspaceError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
SIZE = re.compile(r"\s*(?P<number>\d+(\.\d+)?)\s*(?P<unit>[kmgt]i?)?b?\s*", re.IGNORECASE)

Check = Callable[[str, Any], Any]  # from an option's name and value to the plain value that is stored


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
        check: called with the option's name and value, returns the value to store; raises `SubspaceError`.
        flags: on the command line; by default the name, as ``--the-name``; empty: the option has no flag.
        convert: from the command line's text to the value.
        shown: what argparse's `add_argument` takes beside (``choices``, ``metavar``, ``action``, …).
    """
    facts = {"help": help, "check": check, "flags": flags, "convert": convert, "shown": shown}
    return field(default=default, metadata=facts)


def whole(least: int | None = None, *, optional: bool = False) -> Check:
    """Return a check for whole numbers from `least` on; where `optional`, None passes."""

    def check(name: str, value: Any) -> int | None:
        if value is None and optional:
            return None
        found = whole_number(value)
        if found is None or (least is not None and found < least):
            bound = "" if least is None else f", at least {least}"
            raise SubspaceError(f"{name}={value!r}: give a whole number{bound}.")
        return found

    return check


def directions_or_share(name: str, value: Any) -> int | float:
    """Return a number of directions from 1 on, or a share of energy in (0, 1).

    Raises:
        SubspaceError: it is neither.
    """
    found = whole_number(value)
    if found is None and isinstance(value, Real) and 0 < value < 1:
        return float(value)
    if found is None or found < 1:
        raise SubspaceError(
            f"{name}={value!r}: give a number of directions (1, 2, …) or a share of energy to keep (0.5)."
        )
    return found


def directions_or_share_or_none(name: str, value: Any) -> int | float | None:
    """Return what `directions_or_share` does, or None of None."""
    return None if value is None else directions_or_share(name, value)


def one_of(*choices: str, optional: bool = False) -> Check:
    """Return a check for a few words; where `optional`, None passes."""

    def check(name: str, value: Any) -> str | None:
        if not (value is None and optional) and not (isinstance(value, str) and value in choices):
            raise SubspaceError(f"{name}={value!r}: there is no such choice; choose one of {', '.join(choices)}.")
        return value

    return check


def truth(name: str, value: Any) -> bool:
    """Return True or False, also of 1 or 0; raise `SubspaceError` where the value is neither."""
    if isinstance(value, bool):
        return value
    # without an import of numpy, whose booleans are no whole numbers
    numpy = type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")
    if not numpy and whole_number(value) not in (0, 1):
        raise SubspaceError(f"{name}={value!r}: give True or False.")
    return bool(value)


def truth_or_none(name: str, value: Any) -> bool | None:
    """Return what `truth` does, or None of None."""
    return None if value is None else truth(name, value)


def names_or_none(name: str, value: Any) -> Any:
    """Return names, a regular expression or None; raise `SubspaceError` where the value is none of these."""
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise SubspaceError(
                f"{name}={value!r}: it is no regular expression ({error}). Give one, or a list of names of modules."
            ) from error
    several = not isinstance(value, str) and isinstance(value, (Sequence, set, frozenset))
    if value is None or isinstance(value, str) or (several and all(isinstance(each, str) for each in value)):
        return value
    raise SubspaceError(f"{name}={value!r}: give names of modules, or a regular expression.")


def weights_or_file(name: str, value: Any) -> Any:
    """Return a word, a file or a mapping, each of which is read later; raise `SubspaceError` for other kinds."""
    if not isinstance(value, (str, Path, Mapping)):
        raise SubspaceError(f"{name}={value!r}: give equal, norm, or numbers by source (or a JSON file of them).")
    return value


def sizes_by_name(name: str, value: Any) -> dict[str, int] | None:
    """Return names of modules with a number of directions each, also of texts ``NAME=K``, or None.

    Raises:
        SubspaceError: it is neither, or a number is none from 1 on.
    """
    if value is None:
        return None
    advice = f"{name}={value!r}: give names of modules with a number of directions each, as"
    if isinstance(value, Sequence) and not isinstance(value, str):
        pairs = [str(each).rpartition("=") for each in value]
        if not all(key and sign and k.isdecimal() for key, sign, k in pairs):
            raise SubspaceError(f"{advice} NAME=K, with K from 1 on.")
        if len({key for key, _, _ in pairs}) < len(pairs):
            raise SubspaceError(f"{name}={value!r}: a name comes twice. Give each once.")
        value = {key: int(k) for key, _, k in pairs}
    if not isinstance(value, Mapping) or not value or not all(isinstance(key, str) and key for key in value):
        raise SubspaceError(f"{advice} {{'query': 8}}.")
    return {key: _directions(name, key, k) for key, k in value.items()}


def _directions(name: str, key: str, value: Any) -> int:
    found = whole_number(value)
    if found is None or found < 1:
        raise SubspaceError(f"{name}: {key!r} has {value!r}; give a whole number, at least 1.")
    return found


def base_name(name: str, value: Any) -> str | None:
    """Return a base model's name in its normal form, or None; raise `SubspaceError` for what is no name."""
    return check_said(value)


def size(name: str, value: Any) -> Any:
    """Return a size as it is; raise `SubspaceError` where it is none."""
    parse_size(value)
    return value


def anything(name: str, value: Any) -> Any:
    """Return every value as it is: it is checked where it is used."""
    return value


def whole_number(value: Any) -> int | None:
    """Return an integer of any library as Python's own; None for other values, booleans among them."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


class Options(Shown):
    """Base of the dataclasses of options: checks every field as its definition says, and stores plain values."""

    _joint = "="

    def _shown_facts(self) -> Iterable[tuple[str, Any]]:
        for name in self.changed():
            yield name, short(repr(getattr(self, name)))

    def __post_init__(self) -> None:
        for each in fields(self):  # type: ignore[arg-type]
            self._store(each.name, each.metadata["check"](each.name, getattr(self, each.name)))

    def __hash__(self) -> int:
        return hash(tuple(_hashable(getattr(self, name)) for name in self.names()))

    def _store(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclasses are frozen

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of all options, in order."""
        return [each.name for each in fields(cls)]  # type: ignore[arg-type]

    def changed(self) -> list[str]:
        """Return the names of the options that are not at their defaults."""
        return [each.name for each in fields(self) if getattr(self, each.name) != each.default]  # type: ignore[arg-type]


def _hashable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return frozenset(value.items())
    if isinstance(value, (set, frozenset)):
        return frozenset(value)
    return tuple(value) if isinstance(value, list) else value
