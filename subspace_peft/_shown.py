"""How results look in a REPL and in a notebook: a few facts on one line, and a small table.

Nothing here reads a file: a class says what it has in memory. What cannot be said, of an object that is half made or
closed, is left out, and showing an object never raises.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from .energy import EXPLAINED

WIDTH = 100
WIDEST_CELL = 200
MOST_ROWS = 12

Table = tuple[Sequence[str], Iterable[Sequence[Any]], int]  # head, rows, and how many rows there are


class Shown:
    """A class whose objects show what they are by `_shown_facts`, and in notebooks by `_shown_table` as well."""

    _joint = ": "  # between a label and its value

    def _shown_facts(self) -> Iterable[tuple[str, Any]]:
        """Yield what is told: label and value; values of None are left out."""
        return ()

    def _shown_table(self) -> Table | None:
        """Return the table of a notebook, or None."""
        return None

    def _known(self) -> list[tuple[str, str]]:
        told = []
        try:
            for label, value in self._shown_facts():
                if value is not None:
                    told.append((label, str(value)))
        except Exception:
            told.append(("state", "incomplete"))
        return told

    def __repr__(self) -> str:
        known = self._known()
        lines = [f"{type(self).__name__}("]
        for place, (label, value) in enumerate(known):
            label = f"{label}{self._joint}"
            fact = f"{label}{short(printable(value), WIDTH - len(label) - 5)}{', ' if place + 1 < len(known) else ''}"
            # lines end between facts, since a text with a line's end in it is another one
            if len(lines[-1]) + len(fact.rstrip()) >= WIDTH:
                lines.append("    ")
            lines[-1] += fact
        return "\n".join(map(str.rstrip, lines)) + ")"

    def _repr_html_(self) -> str:
        parts = [f"<strong>{html.escape(type(self).__name__)}</strong>", table((), self._known())]
        try:
            found = self._shown_table()
            if found is not None:
                parts.append(table(*found))
        except Exception:  # as in `_known`
            pass
        return f"<div>{''.join(parts)}</div>"


class Facts(dict[str, Any], Shown):
    """A dict of facts that is shown in short: ``dict(facts)`` is the whole of it, for printing and for JSON."""

    # what is told first, of those that a dict has; lists by their lengths
    FIRST = (
        "kind",
        "modules",
        "k",
        "base_model",
        "coefficients",
        "own_directions",
        "sources",
        "energy_kept",
        "energy_left_out",
        "energy_random",
        "orthonormality",
        "problems",
        "bytes",
        "basis_fingerprint",
        "fingerprint",
        "location",
    )

    def _shown_facts(self) -> Iterable[tuple[str, Any]]:
        told = [key for key in self.FIRST if self.get(key) is not None]
        for key in told:
            yield key, _in_short(key, self[key])
        if more := sum(value is not None for value in self.values()) - len(told):
            yield "and", f"{more} more"

    def _repr_html_(self) -> str:
        keys = dict.fromkeys([*(key for key in self.FIRST if key in self), *self])
        rows = [(key, _in_short(key, self[key])) for key in keys if self[key] is not None]
        return f"<div><strong>{type(self).__name__}</strong>{table(('key', 'value'), rows, len(rows))}</div>"

    __repr__ = Shown.__repr__


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], count: int | None = None) -> str:
    """Return an HTML table of the theme's own looks, every cell escaped.

    Args:
        head: names of the columns; empty: none.
        rows: cells; at most `MOST_ROWS` are shown of a table with a head.
        count: how many rows there are.
    """
    most = MOST_ROWS if head else None
    lines = [_row("th", head)] if head else []
    lines += [_row("td", cells) for cells in islice(rows, most)]
    if most is not None and count is not None and count > most:
        lines.append(f'<tr><td colspan="{len(head)}">… and {count - most:,} more</td></tr>')
    return f"<table>{''.join(lines)}</table>"


def core_table(cores: Mapping[str, Any]) -> Table:
    """Return the table of a task's cores: module → (k_out, k_in)."""
    rows = ((name, " × ".join(map(str, core.shape))) for name, core in cores.items())
    return ("module", "core"), rows, len(cores)


def said_of_directions(directions: Mapping[str, int]) -> str:
    """Return in words how many directions of its own a task has.

    Args:
        directions: module → how many, of all its modules.
    """
    have = [rank for rank in directions.values() if rank]
    if not have:
        return "none"
    if len(have) == len(directions) and len(set(have)) == 1:
        return f"{have[0]} per module"
    return f"{sum(have):,} in {len(have)} of {len(directions)} modules"


def fingerprint(value: str | None) -> str | None:
    """Return the start of a fingerprint, which tells bases apart."""
    return None if not value else f"{value[:12]}…"


def printable(text: str) -> str:
    """Return a text with escapes for what would control a terminal, turn a line or be refused by an encoding."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def short(text: Any, most: int = 60) -> str | None:
    """Return a text with its middle left out where it is long."""
    if text is None:
        return None
    text = str(text)
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most // 2) :]}"


def size(count: float | None) -> str | None:
    """Return a size in bytes, with its unit."""
    if count is None:
        return None
    if count < 10_000:
        return f"{count:,} bytes"
    power = min(3, (len(str(int(count))) - 1) // 3)
    return f"{count / 1000**power:,.1f} {('', 'kB', 'MB', 'GB')[power]}"


def _in_short(key: str, value: Any) -> str | None:
    if key == "own_directions":
        return said_of_directions(value)
    if isinstance(value, (dict, list, tuple, set)):
        return str(len(value))
    if key.endswith("fingerprint"):
        return fingerprint(str(value))
    return f"{value:.4g}" if isinstance(value, float) else short(str(value).removeprefix(f"{key}="))


def _row(kind: str, cells: Sequence[Any]) -> str:
    drawn = []
    for cell in (str(short(printable(str(cell)), WIDEST_CELL)) for cell in cells):
        told = f' title="{html.escape(EXPLAINED)}"' if "energy" in cell else ""
        drawn.append(f'<{kind} style="text-align: left; padding: 0 1em 0 0"{told}>{html.escape(cell)}</{kind}>')
    return f"<tr>{''.join(drawn)}</tr>"
