"""The command line's reference, from its parser: every verb, group, flag, default and example that it has."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from html import escape


def command_line_page(parser: argparse.ArgumentParser) -> str:
    """Return the page, in Markdown.

    Args:
        parser: the whole command line. Where it has its verbs in groups (`groups` of its subparsers: title → names),
            the page has them too.
    """
    return "\n".join(["# Command line", "", *_described(parser), *_verbs(parser, 2)])


def _verbs(parser: argparse.ArgumentParser, level: int) -> Iterator[str]:
    """Yield a section for each verb of a parser, with its own verbs below it."""
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            continue
        lines = {line.dest: line.help or "" for line in action._choices_actions}
        groups = getattr(action, "groups", None) or {"": list(action.choices)}
        for title, names in groups.items():
            if title:
                yield f"\n{'#' * level} {title[:1].upper()}{title[1:]}\n"
            for name in names:
                verb, below = action.choices[name], level + bool(title)
                yield f"\n{'#' * below} {name} {{#{verb.prog.partition(' ')[2].replace(' ', '-')}}}\n"
                yield from _described(verb, lines.get(name, ""))
                yield from _verbs(verb, below + 1)


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
    if parser.epilog and "\n" in parser.epilog.strip():
        yield f"```text\n{parser.epilog.strip()}\n```\n"
    elif parser.epilog:
        yield f"<p>{_text(parser.epilog)}</p>\n"


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
