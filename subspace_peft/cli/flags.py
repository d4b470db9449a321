"""Flags made from the definitions of options, and options made from the flags that were given."""

from __future__ import annotations

import argparse
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import Field, fields
from typing import Any

from ..builders.option_checks import Options, number, truth_or_none
from ..builders.options import BuildOptions, CompleteOptions, Resources, UpdateOptions
from ..errors import HubUnavailableError, ProcessError, SourceError, SubspaceError
from .parsers import BASE, METHOD, RUNS, SIZE, SOURCES, STORED, grouped

INPUTS = {"base_model": "--base-model", "like": "--like", "clusters": "--clusters", "precision": "--precision"}
# option → the group of its flag
GROUPS = {
    SIZE: ("k", "k_in", "k_pattern", "budget", "complete", "with_", "add", "add_in"),
    METHOD: ("builder", "weights", "alternations", "seed", "leave_one_out"),
    STORED: ("directions", "keep_cores"),
    BASE: ("target_modules", "base_model_name"),
    SOURCES: ("skip_bad", "allow_bin", "partial"),
    RUNS: ("max_memory",),
}
GROUP_OF = {name: title for title, names in GROUPS.items() for name in names}


def add_options(verb: ArgumentParser, kind: type[Options], leave_out: Collection[str] = ()) -> None:
    """Add a flag for every option that has one.

    Args:
        verb: the verb's parser.
        kind: the dataclass of options.
        leave_out: names of options that the verb does not take.
    """
    for each in fields(kind):  # type: ignore[arg-type]
        flags = flags_of(each)
        if not flags or each.name in leave_out or each.name == "progress":
            continue  # bars are a matter of -q, of every verb
        shown: dict[str, Any] = dict(each.metadata["shown"])
        if each.default is False:
            shown["action"] = "store_true"
        elif each.default is True:
            shown["action"] = "store_false"
        elif each.metadata["check"] is truth_or_none:
            shown["action"] = argparse.BooleanOptionalAction
        elif each.metadata["convert"] in (int, float):
            shown["type"] = each.metadata["convert"]
        if each.metadata["convert"] in (int, float, number) and not {"choices", "metavar"} & shown.keys():
            shown["metavar"] = "K" if each.name in ("k", "k_in") else "N"
        help = each.metadata["help"].replace("{default}", str(each.default))
        # None: not given, so that a file's settings or the option's own default hold
        grouped(verb, GROUP_OF[each.name]).add_argument(*flags, dest=each.name, default=None, help=help, **shown)


def flags_of(option: Field[Any]) -> tuple[str, ...]:
    """Return an option's flags; empty where it has none."""
    flags = option.metadata["flags"]
    return (f"--{option.name.replace('_', '-')}",) if flags is None else tuple(flags)


def numbered(text: str, flag: str) -> int | float:
    """Read the number that was given with a flag.

    Raises:
        SubspaceError: the text is none.
    """
    try:
        return number(text)
    except SubspaceError as error:
        raise SubspaceError(f"{flag} {error}") from error


def given_options(args: Namespace, kind: type[Options]) -> dict[str, Any]:
    """Return the options that were given on the command line, by name.

    Raises:
        SubspaceError: a text that is no number.
    """
    found = {}
    for each in fields(kind):  # type: ignore[arg-type]
        value = getattr(args, each.name, None)
        if each.name == "progress":
            value = False if getattr(args, "quiet", 0) else None
        if value is not None:
            found[each.name] = numbered(value, flags_of(each)[0]) if each.metadata["convert"] is number else value
    return found


def flag_of(name: str) -> str:
    """Return the flag of an option or input by its name in Python."""
    return _flags().get(name, f"--{name.replace('_', '-')}")


@contextmanager
def as_in_file(names: Collection[str]) -> Iterator[None]:
    """Let errors within name the values of a file as they are written there: ``k=0`` as ``k: 0``.

    Args:
        names: options and inputs whose values are from the file; read when an error is raised.
    """
    try:
        yield
    except SubspaceError as error:
        if not names or isinstance(error, (SourceError, ProcessError, HubUnavailableError)):
            raise
        either = "|".join(sorted(names, key=len, reverse=True))
        # not hints, which have a flag after them, nor names without a value
        written = re.compile(rf"(?<![\w/.-])({either})=(?![\w'\[\]]*\s\(--?)(?=[^\s.,:;)])")
        text = str(error)
        said = "`".join(
            written.sub(r"\1: ", part) if place % 2 == 0 else part for place, part in enumerate(text.split("`"))
        )
        if said == text:
            raise
        raise SubspaceError(said) from error


def _flags() -> dict[str, str]:
    kinds = (BuildOptions, UpdateOptions, CompleteOptions, Resources)
    found = {each.name: flags_of(each) for kind in kinds for each in fields(kind)}
    return {name: flags[0] for name, flags in found.items() if flags} | INPUTS | {"max_drift": "--max-drift"}
