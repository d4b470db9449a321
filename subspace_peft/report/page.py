"""Render a report as one HTML file that needs nothing else, and may fetch nothing."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from .._io.places import last_part
from ..energy import FAITHFUL, mean, percent
from .chart import Chart, Line, chart
from .facts import LEFT_OUT, ReportFacts
from .headlines import headlines
from .page_data import page_data
from .terms import TERMS, WORDS

FOLDER = Path(__file__).parent / "template"
SHARES = {
    "kept": "energy the basis keeps of adapters it was built from",
    "kept_of_new": "energy the basis keeps of adapters it was not built from",
    "null_kept": "the same for noise of the same strength, of its own basis",
    LEFT_OUT: "energy a basis keeps of adapters left out of it",
    "mean_only": "energy that the others' mean alone keeps of them",
    "random": "energy random directions keep of anything",
}
SIZES = {
    "bytes_per_lora": "a LoRA",
    "bytes_per_task": "a task in the basis",
    "bytes_of_basis": "the basis, as it is stored",
}
NARROWEST = 1.5  # percent of a bar that whatever is above zero is drawn as


def page(report: ReportFacts) -> str:
    """Return the whole page.

    Args:
        report: its contents.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"breakable": _breakable, "percent": percent, "mean": mean, "code": _code, "width": _width}
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "choose.js"))
    choices = report.choices if report.curves else {}
    return environment.get_template("page.html.j2").render(
        report=report,
        title=f"Basis report: {last_part(place) if (place := report.basis['location']) else 'a basis in memory'}",
        cards=headlines(report.numbers, report.made.get("basis"), report.basis.get("builder")),
        rows=_rows(report.numbers),
        charts=[each for each in _charts(report) if each.lines],
        left_out=LEFT_OUT,
        faithful=FAITHFUL,
        terms=TERMS,
        words=WORDS,
        numbers=count(1).__next__,
        choices=choices,
        most={name: len(curve["seen"]) for name, curve in report.curves.items()},
        measured_of=_measured_of(report),
        alternated=_alternated(report),
        data=Markup(page_data(report)) if choices else "",
        # the package's own files, held against their hashes by the browser
        style=Markup(style),
        style_hash=_hash(style),
        script=Markup(script),
        script_hash=_hash(script),
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _code(text: str) -> Markup:
    """Escape a text and set what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _breakable(name: str) -> Markup:
    """Escape a module's name, and let lines break behind its dots and strokes."""
    return Markup(re.sub(r"([._/-])(?=\w)", r"\1<wbr>", str(escape(name))))


def _width(share: float | None) -> str:
    return f"{max(NARROWEST, 100 * share):.1f}%" if share else "0"


def _measured_of(report: ReportFacts) -> str:
    """Return what the curves are of, where that is not all."""
    (modules, all_modules), (adapters, all_adapters) = report.how["modules"], report.how["sources"]
    said = []
    if modules < all_modules:
        said.append(
            f"{modules} of {all_modules} modules were measured: shares are of these, bytes of all, the others having"
            " as many directions as their adapters may span at most."
        )
    if adapters < all_adapters:
        said.append(
            f"Shares are of bases of {adapters} of the {all_adapters} adapters, which keep somewhat more of those than"
            " a basis of all keeps of all."
        )
    return "".join(f"{each} " for each in said)


def _alternated(report: ReportFacts) -> str:
    """Return at which k the curves have what the builder's alternations add."""
    found = {k for curve in report.curves.values() for k in curve["alternated"]}
    every = all(len(curve["alternated"]) >= max(curve["spans"]) - 1 for curve in report.curves.values())
    if not found or every:
        return ""
    common = sorted(set.intersection(*(set(curve["alternated"]) for curve in report.curves.values())))
    at = f"k = {', '.join(map(str, common))}" if common else "some k"
    return f"What the builder's alternations add was measured at {at} at least, and is linear in between."


def _charts(report: ReportFacts) -> list[Chart]:
    """Return the spectra beside noise, and the energy kept by k."""
    if not report.modules:
        return []
    modules, made = list(report.modules.values()), []
    for side, words in (("out", "output"), ("in", "input")):
        curves = {key: _mean_curve([getattr(m, f"{key}_{side}") for m in modules]) for key in ("spectrum", "null")}
        length = min(map(len, curves.values()))
        lines = [
            Line("these adapters", "fleet", curves["spectrum"][:length]),
            Line("noise of the same strength", "null", curves["null"][:length]),
        ]
        xs = range(1, length + 1)
        title = f"Share of the energy in each direction, {words} side"
        made.append(chart(title, "direction", "share", xs, lines, log_x=False, log_y=True))
    shared = [k for k in modules[0].ks if all(k in m.ks for m in modules)]
    means = {
        key: [sum(getattr(m, key)[m.ks.index(k)] for m in modules) / len(modules) for k in shared]
        for key in ("seen", "left_out", "null", "random")
    }
    lines = [
        Line("of adapters it was built from", "fleet", means["seen"]),
        Line("of adapters left out", "others", means["left_out"]),
        Line("of noise it was built from", "null", means["null"]),
        Line("random directions, of anything", "random", means["random"]),
    ]
    title = "Energy kept by a basis of k directions per side"
    return [*made, chart(title, "directions per side, k", "kept", shared, lines, log_x=True, log_y=False)]


def _mean_curve(curves: list[list[float]]) -> list[float]:
    shortest = min(map(len, curves))
    return [sum(values) / len(values) for values in zip(*(curve[:shortest] for curve in curves), strict=True)]


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
    if numbers.get("extra_rank"):
        words = "own directions with which each adapter is faithful, of those it was built from where there are any"
        rows.append((words, str(numbers["extra_rank"])))
    if numbers["bytes_per_lora"] is not None:
        even = numbers["break_even"]
        rows.append(("smaller in all", f"from {even:,} adapter{'' if even == 1 else 's'} on" if even else "never"))
    rows.append(("adapters", f"{numbers['sources']:,}"))
    rows.append(("of them in groups of one random start", f"{numbers['in_seed_groups']:,}"))
    return rows
