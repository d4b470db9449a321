"""Errors in the words of the verb at hand: Python's ``allow_bin=True`` as its ``--allow-bin``.

What a verb understands is read from its own parser, so a new flag is spoken of as soon as it is there, and no flag of
another verb ever is. An argument that the verb has no flag for is said to be one of Python's.
"""

from __future__ import annotations

import argparse
import re
import warnings
from argparse import Action, ArgumentParser
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ..errors import HubUnavailableError, ProcessError, SourceError

# flags whose argument in Python has another name than theirs
NAMES = {
    "--force": ("overwrite=True", "force=True"),
    "--no-base-check": ("check_base_model=False", "check_base=False"),
    "--quiet": ("progress=False",),
    "--branch": ("revision=",),
    "--message": ("commit_message=",),
    "--as-lora": ("as_lora=True",),
    "--no-pad": ("pad=False",),
    "--no-own-directions": ("own_directions=False",),
    "--old-basis": ("basis=", "old_basis="),
    "--tasks": ("cores=",),
    "--fleet": ("sources=",),
}
PAIR = r"\b(?P<name>[a-z]\w*)=(?P<value>'[^']*'|\"[^\"]*\"|\[[^\]]*\]|…|-?[\w.+]*[\w+])?"
HINT = re.compile(rf"{PAIR}\s\((?P<flag>--?[a-z][\w-]*)(?P<more>[^()]*)\)")
# a function of Python with the command that does the same
TWICE = re.compile(r"`[a-z]\w*(?:\([^`]*\))?` \((`subspace-peft [^`]*`)\)")
ASIDE = re.compile(r"\s\((?P<flag>--?[a-z][\w-]*)\)")
WRITTEN = re.compile(rf"(?<![\w/.-]){PAIR}")
SWITCHED = ("True", "False", "…", None)

Flags = Mapping[str, Mapping[str, str]]


def flags_of_verb(verb: ArgumentParser) -> dict[str, dict[str, str]]:
    """Return the flags of a verb: name of an argument in Python → its value, or "" for any → the flag."""
    found: dict[str, dict[str, str]] = {}
    for action in verb._actions:
        for name, value, flag in _said(action):
            found.setdefault(name, {})[value] = flag
    return found


def _said(action: Action) -> list[tuple[str, str, str]]:
    if not action.option_strings or action.dest == "help":
        return []
    flag = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        return [(action.dest, "True", flag), (action.dest, "False", action.option_strings[-1])]
    value = {True: "True", False: "False"}.get(action.const, "") if action.nargs == 0 else ""
    own = [(action.dest, value, flag)]
    for each in (pair for known in action.option_strings for pair in NAMES.get(known, ())):
        name, _, said = each.partition("=")
        own.append((name, said, flag))
    return own


def verbs_of(parser: ArgumentParser) -> dict[str, ArgumentParser]:
    """Return every verb of a parser with the parser of its own arguments; verbs of verbs as ``bundle create``."""
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, verb in action.choices.items():
                inner = verbs_of(verb)
                found |= {f"{name} {each}": own for each, own in inner.items()} or {name: verb}
    return found


def in_flags(error: BaseException | str, flags: Flags) -> str:
    """Return an error's text with arguments in the words of a verb: ``k=0`` as ``-k 0``.

    Texts about sources name files, whose names may hold anything; there only hints, ``skip_bad=True (--skip-bad)``,
    are changed.

    Args:
        error: the error, or the text of one.
        flags: of the verb, see `flags_of_verb`.
    """
    text = hints_in_flags(str(error), flags)
    if isinstance(error, (SourceError, ProcessError, HubUnavailableError)):
        return text
    # not within calls that are quoted, unless all of the quotation is an argument
    parts = text.split("`")
    for place, part in enumerate(parts):
        alone = place % 2 == 1 and WRITTEN.fullmatch(part) is not None
        if place % 2 == 0 or alone:
            parts[place] = WRITTEN.sub(lambda found: _written(found, flags), part)
    return "`".join(parts)


def hints_in_flags(text: str, flags: Flags) -> str:
    """Return a text with its hints alone in the words of a verb; the rest may hold any names."""
    known = {flag for each in flags.values() for flag in each.values()}
    text = HINT.sub(lambda found: _hint(found, flags), TWICE.sub(r"\1", text))
    # a flag beside the name of a function, of another verb than this
    return ASIDE.sub(lambda found: found[0] if found["flag"] in known else "", text)


@contextmanager
def spoken_warnings(verb: str, flags: Flags) -> Iterator[None]:
    """Show warnings within as the verb's errors are shown: in one line, in its flags, without places in the source."""

    def line(message: Warning | str, category: type[Warning], *place: object) -> str:
        return f"subspace-peft {verb}: {in_flags(str(message), flags)}\n"

    own, warnings.formatwarning = warnings.formatwarning, line  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.formatwarning = own


def _hint(found: re.Match[str], flags: Flags) -> str:
    known = {flag for each in flags.values() for flag in each.values()}
    if found["flag"] in known:
        return f"{found['flag']}{found['more']}"
    return f"{found['name']}={found['value'] or ''} in Python"


def _written(found: re.Match[str], flags: Flags) -> str:
    own, value = flags.get(found["name"]), found["value"]
    after = found.string[found.end() :]
    if own is None or (value not in own and "" not in own):
        # numbers and names are facts, such as the k of a basis; what is switched is advice
        ends = re.match(r"[\s.,:;)`]|$", after) is not None
        advice = value in SWITCHED and ends and not after.startswith(" in Python")
        return f"{found[0]} in Python" if advice else found[0]
    if value in own:
        return own[str(value)]
    return own[""] + ("" if value in (None, "…") and re.match(r"[\s.,:;)`]|$", after) else f" {value or ''}")
