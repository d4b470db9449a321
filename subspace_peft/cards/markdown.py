"""Values as Markdown, escaped so that a value from elsewhere stays within its sentence, cell or line of code.

Functions that return `Markup` return text that templates put out as it is. The Markdown is CommonMark with GitHub's
tables, as the Hub renders it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from markupsafe import Markup

from .._shown import printable

# between letters an underscore is one: names such as `first_task` stay readable
INLINE = re.compile(r"[\\`*\[\]|<~$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)")
# what begins a heading, quotation, list or rule at the start of a line
LINE_START = re.compile(r" ?([#+=-](?=[\s#+=-]|$)|>|~~~|\d+(?=[.)](?:\s|$)))")
BACKTICKS = re.compile("`+")


def text(value: Any) -> Markup:
    """Return `value` as text on one line; `Markup` as it is.

    Templates do this to every value that no other function has made Markdown of, which is their autoescape.
    """
    if isinstance(value, Markup):
        return value
    line = INLINE.sub(lambda found: _entity(found[0]), one_line(value))
    if found := LINE_START.match(line):
        # of a numbered list its full stop, not its number
        cut = found.end(1) if found[1][0].isdigit() else found.start(1)
        line = f"{line[:cut]}\\{line[cut:]}"
    return Markup(line)


def code(value: Any, *, cell: bool = False, most: int | None = None) -> Markup:
    """Return `value` as a code span, and nothing for None or an empty value.

    Args:
        value: the value.
        cell: whether it stands in a table's cell, which a bar would end even within code.
        most: characters to keep, of a hash for example; None for all.
    """
    span = "" if value is None else one_line(value).strip()[:most]
    if not span:
        return Markup("")
    if cell:
        span = span.replace("|", "\\|")
    # a span ends at as many backticks as it began with, and may not touch one of its own
    fence = "`" * _longer_than(span, 1)
    pad = " " if "`" in (span[0], span[-1]) or len(fence) > 1 else ""
    return Markup(f"{fence}{pad}{span}{pad}{fence}")


def fenced(lines: str) -> Markup:
    """Return lines of Python as a code block that none of them can end."""
    fence = "`" * _longer_than(lines, 3)
    return Markup(f"{fence}python\n{lines.strip()}\n{fence}")


def arguments(*values: Any, **named: Any) -> Markup:
    """Return a call's arguments in Python, without the named ones that are None."""
    given = [literal(value) for value in values]
    given += [f"{name}={literal(value)}" for name, value in named.items() if value is not None]
    return Markup(", ".join(given))


def literal(value: Any) -> Markup:
    """Return `value` as a literal in Python, on one line; text in double quotes."""
    if not isinstance(value, str):
        return Markup(repr(value))
    plain = value.replace("\\", "\\\\").replace('"', '\\"')
    return Markup(f'"{printable(plain)}"')


def number(value: Any, form: str | None = None) -> str:
    """Return a number as a table prints it: thousands with commas, fractions with four digits; other values as text.

    Args:
        value: the number; nothing is returned for None.
        form: a format such as ``.3f`` for another way.
    """
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if form is not None:
        return f"{value:{form}}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def table(columns: Mapping[str, Iterable[Any]], *, keep: Iterable[str] = ()) -> Markup:
    """Return a table.

    Args:
        columns: title → cells, as many in each; a column of empty cells is left out.
        keep: titles of columns that stay even so.
    """
    filled = {title: [text(cell) for cell in cells] for title, cells in columns.items()}
    shown = {title: cells for title, cells in filled.items() if any(cells) or title in keep}
    rows = [list(shown), ["---"] * len(shown), *zip(*shown.values(), strict=True)]
    return Markup("\n".join(f"| {' | '.join(row)} |" for row in rows))


def one_line(value: Any) -> str:
    """Return `value` as text without line breaks and control characters, which become spaces."""
    return re.sub(r"^\s+|[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", str(value))


def _entity(mark: str) -> str:
    # entities, not backslashes, where HTML would read the mark first
    return {"<": "&lt;", "&": "&amp;"}.get(mark, f"\\{mark}")


def _longer_than(content: str, least: int) -> int:
    runs = [len(run) for run in BACKTICKS.findall(content)]
    return max(least, max(runs, default=0) + 1) if runs else least
