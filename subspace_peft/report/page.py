"""Render a report as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from .._version import __version__
from ..energy import FAITHFUL, mean, percent
from .facts import LEFT_OUT, ReportFacts

TEMPLATE = "page.html.j2"
WORST = 5  # adapters that are named as fitting badly
SHARES = {
    "kept": "energy the basis keeps of adapters it was built from",
    "kept_of_new": "energy the basis keeps of adapters it was not built from",
    "null_kept": "the same for noise of the same strength, of its own basis",
    LEFT_OUT: "energy a basis keeps of adapters left out of it",
    "mean_only": "energy that the others' mean alone keeps of them",
    "random": "energy random directions keep of anything",
}
SIZES = {"bytes_per_lora": "a LoRA", "bytes_per_task": "a task in the basis", "bytes_of_basis": "the basis"}


def page(report: ReportFacts, figures: Mapping[str, Path]) -> str:
    """Return the whole page, its figures inside it.

    Args:
        report: its contents.
        figures: title → PNG file.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": percent, "mean": mean, "code": _code}
    return environment.get_template(TEMPLATE).render(
        report=report,
        title=f"Basis report: {report.basis['location'] or 'a basis in memory'}",
        rows=_rows(report.numbers),
        figures={name: base64.b64encode(file.read_bytes()).decode() for name, file in figures.items()},
        adapters=sorted(report.sources, key=lambda entry: entry["kept"] if entry["kept"] is not None else 2.0),
        worst=WORST,
        left_out=LEFT_OUT,
        faithful=FAITHFUL,
        version=__version__,
    )


def _code(text: str) -> Markup:
    """Escape a text and set what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _rows(numbers: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of the table of figures: what each is, and its value."""
    rows = [(words, percent(numbers[key])) for key, words in SHARES.items()]
    if numbers["above"] is not None:
        out, inner = numbers["above"]
        rows += [
            ("directions above noise, output and input (median)", f"{out} and {inner}"),
            ("suggested k for new tasks", str(numbers["k_for_new_tasks"] or "none")),
            (
                f"suggested k for these adapters: {percent(FAITHFUL)} of their energy in every module",
                str(numbers["k_for_share"]),
            ),
        ]
    rows += [(f"bytes of {words}", f"{numbers[key]:,}") for key, words in SIZES.items() if numbers[key] is not None]
    if numbers["bytes_per_lora"] is not None:
        even = numbers["break_even"]
        rows.append(("the basis is paid for", f"from {even:,} adapters on" if even else "never"))
    rows.append(("adapters", f"{numbers['sources']:,}"))
    rows.append(("of them in groups of one random start", f"{numbers['in_seed_groups']:,}"))
    return rows
