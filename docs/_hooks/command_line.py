"""The command line's reference, from its parser: every verb, group, flag, default and example that it has."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from html import escape


def command_line_page(parser: argparse.ArgumentParser) -> str:
    """Return the page, in Markdown.

    Args:
        parser: the whole command line.
    """
    return "\n".join(["# Command line", "", *_described(parser), *_verbs(parser, 2)])


def verbs_in(parser: argparse.ArgumentParser) -> dict[str, tuple[argparse.ArgumentParser, str]]:
    """Return a parser's verbs by name, each with its parser and its line in the list of verbs."""
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            lines = {line.dest: line.help or "" for line in action._choices_actions}
            found.update({name: (verb, lines.get(name, "")) for name, verb in action.choices.items()})
    return found


def _verbs(parser: argparse.ArgumentParser, level: int) -> Iterator[str]:
    for name, (verb, line) in verbs_in(parser).items():
        anchor = verb.prog.partition(" ")[2].replace(" ", "-")
        yield f"\n{'#' * level} {name} {{#{anchor}}}\n"
        yield from _described(verb, line)
        yield from _verbs(verb, level + 1)


def _described(parser: argparse.ArgumentParser, line: str = "") -> Iterator[str]:
    """Yield what a parser's help says: description, usage, groups of arguments, and what stands below them."""
    formatter = argparse.HelpFormatter(parser.prog, width=80)
    text = parser.description or line
    if text:
        yield f"<p>{_text(text[:1].upper() + text[1:])}{'' if text.endswith('.') else '.'}</p>\n"
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups, prefix="")
    yield f"```text\n{formatter.format_help().strip()}\n```\n"
    for group in parser._action_groups:
        shown = [each for each in group._group_actions if _is_shown(each)]
        if not shown:
            continue
        yield f"<p><strong>{escape((group.title or '').capitalize())}</strong></p>"
        if group.description:
            yield f"<p>{_text(group.description)}</p>"
        yield '<dl class="flags">'
        for action in shown:
            yield f"<dt>{_invocation(action)}</dt><dd>{_text(_help(parser, action))}</dd>"
        yield "</dl>\n"
    if parser.epilog:
        yield f"```text\n{parser.epilog.strip()}\n```\n"


def _is_shown(action: argparse.Action) -> bool:
    """Return whether an argument is told of: verbs have their own sections, and every verb has ``--help``."""
    verbs = isinstance(action, argparse._SubParsersAction)
    return not verbs and action.help != argparse.SUPPRESS and action.option_strings != ["-h", "--help"]


def _invocation(action: argparse.Action) -> str:
    formatter = argparse.HelpFormatter("")
    if not action.option_strings:
        return f"<code>{escape(formatter._metavar_formatter(action, action.dest)(1)[0])}</code>"
    value = "" if action.nargs == 0 else formatter._format_args(action, action.dest.upper())
    return ", ".join(f"<code>{escape(f'{flag} {value}'.strip())}</code>" for flag in action.option_strings)


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return argparse.HelpFormatter(parser.prog)._expand_help(action) if action.help else ""


def _text(text: str) -> str:
    """Return text as HTML; what stands in backticks, and flags, as code."""
    code = re.compile(r"`([^`]+)`|(?<![\w-])(--[a-z][\w-]*)")
    return code.sub(lambda found: f"<code>{found[1] or found[2]}</code>", escape(text, quote=False))
