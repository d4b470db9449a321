"""A report as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .measure import mean
from .verdict import percent

if TYPE_CHECKING:
    from .facts import FleetReport

WORST = 5  # adapters that are named as fitting badly
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.verdict { border-left: 4px solid #1f5fa8; background: var(--soft); padding: .6rem 1rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; background: white; } code { font-size: .85em; overflow-wrap: anywhere; }
.small { font-size: .85rem; opacity: .8; }
"""


def page(report: FleetReport, figures: Mapping[str, Path]) -> str:
    """The whole page, its figures inside it; `figures` maps titles to PNG files."""
    basis = report.basis
    title = f"Basis report: {basis['location'] or 'a basis in memory'}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="small">fingerprint <code>{basis["fingerprint"]}</code> · {escape(str(basis["builder"]))} ·'
        f" {basis['modules']} modules · "
        f"{escape(basis['k'])} · base model {escape(str(basis['base_model']))}</p>",
        '<div class="verdict" id="verdict">' + "".join(f"<p>{escape(line)}</p>" for line in report.verdict) + "</div>",
        "<h2>Numbers</h2>",
        _table(["", "value"], _rows(report.numbers), "numbers"),
    ]
    for name, file in figures.items():
        data = base64.b64encode(file.read_bytes()).decode()
        parts.append(f'<h2>{escape(name)}</h2><img alt="{escape(name)}" src="data:image/png;base64,{data}">')
    if report.sources:
        parts += _adapters(report)
    if report.modules:
        rows = [
            (
                name,
                f"{m.shape[0]} × {m.shape[1]}",
                f"{m.size[0]}, {m.size[1]}",
                percent(mean(m.kept)),
                percent(mean(m.unseen_here)),
                f"{m.above_out}, {m.above_in}",
                str(m.k_for_share),
            )
            for name, m in report.modules.items()
        ]
        head = ["module", "out × in", "k", "kept", "left out", "above noise (out, in)", "k for 90 %"]
        parts += ["<h2>Modules</h2>", _table(head, rows, "modules")]
    if report.skipped:
        lines = "".join(f"<li>{escape(entry['reason'])}</li>" for entry in report.skipped)
        parts.append(f"<h2>Not used</h2><ul>{lines}</ul>")
    parts.append(f'<h2>How this was measured</h2><p class="small">{escape(_how(report.how))}</p>')
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _rows(numbers: Mapping[str, Any]) -> list[tuple[str, str]]:
    shares = {
        "kept": "energy the basis keeps of adapters it was built from",
        "kept_of_new": "energy the basis keeps of adapters it was not built from",
        "null_kept": "the same for noise of the same strength, of its own basis",
        "unseen": "energy a basis keeps of adapters left out of it",
        "mean_only": "energy that the others' mean alone keeps of them",
        "random": "energy random directions keep of anything",
    }
    rows = [(words, percent(numbers[key])) for key, words in shares.items()]
    if numbers["above"] is not None:
        rows.append(
            ("directions above noise, output and input (median)", f"{numbers['above'][0]} and {numbers['above'][1]}")
        )
        rows.append(("suggested k for new tasks", str(numbers["k_for_new_tasks"] or "none")))
        rows.append(
            ("suggested k for these adapters: 90 % of their energy in every module", str(numbers["k_for_share"]))
        )
    for key, words in {
        "bytes_per_lora": "a LoRA",
        "bytes_per_task": "a task in the basis",
        "bytes_of_basis": "the basis",
    }.items():
        if numbers[key] is not None:
            rows.append((f"bytes of {words}", f"{numbers[key]:,}"))
    if numbers["bytes_per_lora"] is not None:
        rows.append(
            (
                "the basis is paid for",
                f"from {numbers['break_even']:,} adapters on" if numbers["break_even"] else "never",
            )
        )
    rows.append(("adapters", f"{numbers['sources']:,}"))
    rows.append(("of them in groups of one random start", f"{numbers['in_seed_groups']:,}"))
    return rows


def _adapters(report: FleetReport) -> list[str]:
    entries = sorted(report.sources, key=lambda entry: entry["kept"] if entry["kept"] is not None else 2.0)
    worst = ", ".join(f"{entry['name']} ({percent(entry['kept'])})" for entry in entries[:WORST])
    rows = [
        (
            entry["name"],
            "yes" if entry["in_basis"] else "no",
            percent(entry["kept"]),
            percent(entry["unseen"]),
            percent(entry["mean_only"]),
            str(entry["seed_group"]),
            f"{entry['norm']:.4g}",
        )
        for entry in entries
    ]
    head = ["adapter", "in the basis", "kept", "left out", "mean only", "seed group", "norm"]
    return ["<h2>Adapters</h2>", f"<p>Worst kept: {escape(worst)}.</p>", _table(head, rows, "adapters")]


def _how(how: Mapping[str, Any]) -> str:
    (modules, all_modules), (sources, all_sources) = how["modules"], how["sources"]
    if not sources:
        return "From the basis's config; no adapter was read."
    apart = (
        "one shared-seed group at a time"
        if how["left_out"] == "one by one"
        else f"in {how['folds']} folds of whole shared-seed groups"
    )
    return (
        f"{modules} of {all_modules} modules, {sources} of {all_sources} adapters, left out {apart}; bases of the"
        " curves are truncated HOSVDs of the updates, each update of weight 1; noise: the same singular values in"
        f" random directions; seed {how['seed']}. Energies are shares of ‖ΔW‖², means over adapters and modules. A"
        " basis of more adapters than were measured here keeps no less of new ones."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], name: str) -> str:
    cells = "".join(f"<th{_class(i)}>{escape(cell)}</th>" for i, cell in enumerate(head))
    lines = "".join(
        "<tr>" + "".join(f"<td{_class(i)}>{escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table id="{name}"><tr>{cells}</tr>{lines}</table></div>'


def _class(column: int) -> str:
    return ' class="n"' if column else ""
