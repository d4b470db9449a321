"""Parsers of this command line: verbs in groups, short usage, near names for unknown verbs, examples below."""

from __future__ import annotations

import argparse
import difflib
import shutil
import sys
import textwrap
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from .examples import EXAMPLES

WIDEST = 100
NARROWEST = 60
USAGE = 78  # columns of a usage in one line
# titles of argument groups, in the order in which help shows them
SOURCES, SIZE, METHOD = "sources", "size", "how it is built"
STORED, OUTPUT, BASE = "what is stored", "output", "base model"
TASKS, HUB, RUNS = "tasks to carry over", "on the Hub", "how it runs"
GROUPS = (SOURCES, SIZE, METHOD, STORED, TASKS, BASE, HUB, OUTPUT, RUNS)


# what people type after other tools → what it is called here
MEANT = {
    "check": ("validate",),
    "convert": ("project", "export-lora"),
    "copy": ("cp",),
    "create": ("build", "bundle create"),
    "delete": ("cache rm",),
    "doctor": ("env",),
    "extract": ("bundle extract",),
    "info": ("inspect", "env"),
    "list": ("bundle ls", "cache ls"),
    "ls": ("bundle ls", "cache ls"),
    "merge": ("export-lora",),
    "remove": ("cache rm",),
    "rm": ("cache rm",),
    "show": ("inspect",),
    "stats": ("inspect", "report"),
    "train": ("run",),
    "upload": ("push",),
    "verify": ("validate", "cache verify"),
    "version": ("--version", "env"),
}


class Formatter(argparse.HelpFormatter):
    """Text in lines of at most 100 columns, or of the terminal's; examples stay as they are written."""

    def __init__(self, prog: str, **more: Any) -> None:
        columns = shutil.get_terminal_size().columns - 2
        super().__init__(prog, max_help_position=30, width=max(NARROWEST, min(WIDEST, columns)), **more)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return text
        return super()._fill_text(text, width, indent)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # the value once, behind the last of an option's names
        if action.option_strings and action.nargs != 0:
            value = self._format_args(action, self._get_default_metavar_for_optional(action))
            return f"{', '.join(action.option_strings)} {value}"
        return super()._format_action_invocation(action)


class Parser(ArgumentParser):
    """A parser of the command line or of one of its verbs."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, formatter_class=Formatter, **more)
        self._optionals.title = "options"
        self._unknown: list[str] = []

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Namespace | None = None
    ) -> tuple[Namespace, list[str]]:
        """Parse arguments, ``--base_model`` as ``--base-model``."""
        given = [self._hyphened(each) for each in (sys.argv[1:] if args is None else args)]
        self._unknown = [each for each in given if self._is_unknown(each)]
        return super().parse_known_args(given, namespace)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and exit; of a required option that is misspelt, how it is spelt."""
        if self._unknown and message.startswith("the following arguments are required"):
            message = left_over(self._unknown, self)
        super().error(message)

    def _is_unknown(self, argument: str) -> bool:
        flag = argument.partition("=")[0]
        return (
            flag.startswith("--") and flag != "--" and not any(k.startswith(flag) for k in self._option_string_actions)
        )

    def _hyphened(self, argument: str) -> str:
        flag, equals, value = argument.partition("=")
        wanted = flag.replace("_", "-")
        known = self._option_string_actions
        return (
            f"{wanted}{equals}{value}" if flag.startswith("--") and flag not in known and wanted in known else argument
        )

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            raise argparse.ArgumentError(None, unknown(value, action.choices, self.prog))
        super()._check_value(action, value)

    def format_help(self) -> str:
        """Return the help: verbs in their groups, arguments in theirs, examples last."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        verbs = next((each for each in self._actions if isinstance(each, argparse._SubParsersAction)), None)
        text = formatter.format_help()
        if verbs is not None:
            text += "".join(f"\n{part}\n" for part in _verbs(verbs, formatter._width))
        formatter = self._get_formatter()
        for group in sorted(self._action_groups, key=_place):
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments([each for each in group._group_actions if each is not verbs])
            formatter.end_section()
        formatter.add_text(self.epilog)
        return f"{text}\n{formatter.format_help()}"


def _place(group: Any) -> int:
    order = ("positional arguments", *GROUPS, "options")
    return order.index(group.title) if group.title in order else len(order) - 1


def _verbs(verbs: Any, width: int) -> Iterable[str]:
    """Yield the groups of verbs, each verb with its line."""
    lines = {line.dest: line.help or "" for line in verbs._choices_actions}
    left = max(map(len, lines)) + 2
    for title, names in (getattr(verbs, "groups", None) or {"verbs": list(lines)}).items():
        said = [
            textwrap.fill(lines[name], width, initial_indent=f"  {name:<{left}}", subsequent_indent=" " * (left + 2))
            for name in names
        ]
        yield "\n".join([f"{title}:", *said])


def unknown(value: str, known: Iterable[str], prog: str) -> str:
    """Return what is said of a verb that there is not, with those that are near it."""
    known = list(known)
    first, _, rest = value.partition("-")
    if first in known and rest and len(prog.split()) == 1:
        near = [f"{first} {rest}"] if f"{first} {rest}" in EXAMPLES else [first]
    elif value in MEANT and len(prog.split()) == 1:
        near = list(MEANT[value])
    else:
        near = difflib.get_close_matches(value, known, 3, 0.5)
        near = near or [name for name in known if name.startswith(value[:3])][:3]
    return f"there is no verb {value!r}.{_meant(near)} `{prog} --help` lists them all."


def left_over(words: Sequence[str], parser: ArgumentParser) -> str:
    """Return what is said of arguments that a verb does not take, with the options that are near them.

    Args:
        words: the arguments, as they were typed.
        parser: of the verb.
    """
    flag = next((word.partition("=")[0] for word in words if word.startswith("-")), None)
    if flag is None:
        many = any(action.nargs in ("+", "*") for action in parser._actions if not action.option_strings)
        remedy = " Name all of them in one place, before or after the options." if many else ""
        count = "argument" if len(words) == 1 else "arguments"
        return f"{len(words)} {count} too many: {' '.join(words[:3])}{' …' if len(words) > 3 else '.'}{remedy}"
    known = [each for each in parser._option_string_actions if each not in ("-h", "--help")]
    letters = flag.lstrip("-").lower()
    near = [each for each in known if each.lstrip("-").lower() == letters]
    if len(letters) == 1:
        near = list(dict.fromkeys([*near, *(each for each in known if each.startswith(f"--{letters}"))]))[:3]
    long = [each for each in known if each.startswith("--")]
    near = near or [each for each in long if letters.startswith(each[2:]) or each[2:].startswith(letters)]
    near = near or difflib.get_close_matches(f"--{letters}".replace("_", "-"), long, 2, 0.7)
    return f"there is no option {flag}.{_meant(near)} `{parser.prog} --help` lists them all."


def _meant(near: Sequence[str]) -> str:
    return f" Did you mean {' or '.join(near)}?" if near else ""


def grouped(parser: ArgumentParser, title: str) -> Any:
    """Return a parser's group of arguments of that title, made where it has none."""
    for group in parser._action_groups:
        if group.title == title:
            return group
    return parser.add_argument_group(title)


def adder(parser: ArgumentParser, dest: str, metavar: str) -> tuple[Any, Callable[..., ArgumentParser]]:
    """Let a parser have verbs.

    Args:
        parser: the parser.
        dest: the attribute that gets the verb's name.
        metavar: what help calls it.

    Returns:
        The action that holds the verbs, and the function that adds one, as argparse's `add_parser` does, with its
        examples below its help.
    """
    verbs = parser.add_subparsers(dest=dest, metavar=metavar, parser_class=Parser)
    # without a verb its help is shown
    parser.set_defaults(run=None, help_of=parser)

    def add(name: str, **more: Any) -> ArgumentParser:
        verb: ArgumentParser = verbs.add_parser(name, **more)
        path = verb.prog.partition(" ")[2]
        if shown := EXAMPLES.get(path):
            verb.epilog = "examples:\n" + "\n".join(f"  {line}" for line in shown)
        return verb

    return verbs, add


def shorten_usage(parser: ArgumentParser) -> None:
    """Say of a verb's usage only what it needs: its required options and what has no name."""
    formatter = Formatter(parser.prog)
    parts = [parser.prog, "[OPTIONS]"]
    for action in parser._actions:
        value = formatter._format_args(action, action.dest.upper()) if action.nargs != 0 else ""
        if isinstance(action, argparse._SubParsersAction):
            parts.append(f"{action.metavar} …")
        elif not action.option_strings:
            parts.append(formatter._format_args(action, action.dest))
        elif action.required:
            parts.append(f"{action.option_strings[0]} {value}")
    line, rest = " ".join(parts[: 2 + (len(parts) > 2)]), " ".join(parts[3:])
    whole = f"{line} {rest}".strip()
    fits = len(whole) + len("usage: ") <= USAGE
    parser.usage = (whole if fits else f"{line}\n{' ' * (len(parser.prog) + 8)}{rest}").replace("%", "%%")
