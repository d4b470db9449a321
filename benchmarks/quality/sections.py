"""The parts of tables.py's page: scores, differences, rates."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .energy import agreement
from .paired import Difference, difference, mean_score
from .tasks import SENTIMENT

MAIN_ORDER = (
    "head only",
    "mean only",
    "LoRA r=8",
    "LoRA r=1",
    "VeRA r=384",
    "fleet",
    "hybrid",
    "eigenlora",
    "base weights",
    "random",
)
SWEPT = ("a", "h")  # ablations whose rows have a sweep of their own, their steps being of another size
WITHIN = 1.0  # points below LoRA r=8 that count as reaching it

Rows = dict[str, dict[str, dict[str, Any]]]  # method → task → row


def scores(rows: Rows, method: str) -> dict[str, list[float | None]]:
    """Return task → test scores of `method`, per seed."""
    return {task: row["tests"] for task, row in rows[method].items()}


def score_table(rows: Rows, order: Sequence[str]) -> list[str]:
    """Return the mean test score per task and row; the last line is the mean over the tasks that all rows have."""
    methods = [method for method in order if method in rows]
    tasks = list(dict.fromkeys(task for method in methods for task in rows[method]))
    common = [task for task in tasks if all(task in rows[method] for method in methods)]
    lines = [f"| task | {' | '.join(methods)} |", f"|---|{'---|' * len(methods)}"]
    for task in tasks:
        each = [f"{mean_score(scores(rows, m), [task]):.1f}" if task in rows[m] else "–" for m in methods]
        lines.append(f"| {task} | {' | '.join(each)} |")
    if common:
        means = [f"**{mean_score(scores(rows, m), common):.1f}**" for m in methods]
        lines.append(f"| **mean of {len(common)}** | {' | '.join(means)} |")
    counts = [f"{next(iter(rows[m].values()))['trained']:,}" for m in methods]
    return [*lines, f"| trained beside the head | {' | '.join(counts)} |"]


def difference_line(name: str, found: Difference) -> str:
    star = " *" if found.beyond_noise else ""
    return f"| {name} | {found}{star} | {found.wins} / {found.ties} / {found.losses} | {len(found.tasks)} |"


DIFFERENCES = ["| | points [95 % interval] | tasks won / tied / lost | tasks |", "|---|---|---|---|"]


def differences(pairs: Iterable[tuple[str, Rows, str, Rows, str]], only: Sequence[str] | None = None) -> list[str]:
    """Return a line per (name, rows, method, rows, method) of which both sides are there."""
    lines = []
    for name, ours, a, theirs, b in pairs:
        if a in ours and b in theirs:
            left, right = scores(ours, a), scores(theirs, b)
            common = [task for task in left if task in right and (only is None or task in only)]
            if common:
                lines.append(
                    difference_line(name, difference({t: left[t] for t in common}, {t: right[t] for t in common}))
                )
    return lines


def reached(rows: Rows, method: str, target: str = "LoRA r=8") -> dict[int, float]:
    """Return step → share of runs of `method` that had come near the final score of `target`.

    A (task, seed) run has where its validation score was, at that step or before, within a point of the mean that
    `target` ended with on that task.
    """
    hits: dict[int, list[bool]] = {}
    for task, row in rows[method].items():
        if task not in rows[target]:
            continue
        ends = [value or 0.0 for value in rows[target][task]["validations"]]
        goal = sum(ends) / len(ends) - WITHIN / 100
        for curve in row["curves"]:
            there = False
            for step, value in curve:
                there = there or (value or 0.0) >= goal
                hits.setdefault(int(step), []).append(there)
    return {step: sum(each) / len(each) for step, each in sorted(hits.items())}


def reached_table(rows: Rows, order: Sequence[str]) -> list[str]:
    methods = [method for method in order if method in rows]
    found = {method: reached(rows, method) for method in methods}
    steps = sorted({step for each in found.values() for step in each})
    lines = [f"| step | {' | '.join(methods)} |", f"|---|{'---|' * len(methods)}"]
    return lines + [
        f"| {step} | {' | '.join(f'{100 * found[m][step]:.0f} %' if step in found[m] else '–' for m in methods)} |"
        for step in steps
    ]


def rates_table(found: Mapping[str, Rows]) -> list[str]:
    """Return, per row of the main table and per size, the rates that were best on the validation split."""
    lines = ["| row | median best rate | smallest | largest | tasks |", "|---|---|---|---|---|"]
    listed = [(m, found["main"][m]) for m in MAIN_ORDER if m in found["main"]]
    listed += [
        (f"{m}, k = {k}", found[f"size-{k}"][m]) for k in (8, 28) if f"size-{k}" in found for m in ("fleet", "random")
    ]
    for name, tasks in listed:
        rates = sorted(row["rate"] for row in tasks.values())
        lines.append(f"| {name} | {statistics.median_low(rates):g} | {rates[0]:g} | {rates[-1]:g} | {len(rates)} |")
    return lines


def transfer_table(listed: Iterable[tuple[str, Rows]]) -> list[str]:
    """Return the mean validation score, in points, of the fleet's row at each rate, a line per name and rows.

    Only rates that were tried on all tasks.
    """
    lines = {}
    for name, rows in listed:
        sweeps = [dict(row["sweep"]) for row in rows.get("fleet", {}).values()]
        if sweeps:
            common = set.intersection(*(set(sweep) for sweep in sweeps))
            means = {rate: 100 * sum(sweep[rate] or 0.0 for sweep in sweeps) / len(sweeps) for rate in common}
            lines[f"{name} ({len(sweeps)} tasks)"] = means
    rates = sorted({rate for means in lines.values() for rate in means})
    table = [f"| | {' | '.join(f'{rate:g}' for rate in rates)} |", f"|---|{'---|' * len(rates)}"]
    for name, means in lines.items():
        cells = [f"{means[rate]:.1f}" if rate in means else "–" for rate in rates]
        table.append(f"| {name} | {' | '.join(cells)} |")
    return table


def worst_seeds(rows: Rows) -> list[str]:
    """Return the lowest single score per task and row, in points."""
    tasks = list(dict.fromkeys(task for each in rows.values() for task in each))
    lines = [f"| worst seed | {' | '.join(rows)} |", f"|---|{'---|' * len(rows)}"]
    for task in tasks:
        cells = [
            f"{100 * min(s or 0.0 for s in rows[m][task]['tests']):.1f}" if task in rows[m] else "–" for m in rows
        ]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return lines


def ablation_lines(found: Mapping[str, Rows], swept: Rows, usual: Rows) -> list[str]:
    """Return every variant minus the fleet's row.

    That row is its own experiment's where it has one, or that of `swept` or `usual`.
    """
    lines = []
    for name, rows in sorted(found.items()):
        if name.startswith("ablation-"):
            letter = name.removeprefix("ablation-").split("-")[0]
            against = rows if "fleet" in rows else swept if letter in SWEPT else usual
            lines += differences(
                (f"({letter}) {a}", rows, a, against, "fleet") for a in rows if a.split()[0] not in ("LoRA", "fleet")
            )
    return lines


def rate_lines(rates: Rows, usual: Rows) -> list[str]:
    """Return rates between, each against the usual one, and core against LoRA.

    Beside them what both gave in `usual`, an earlier run of the same.
    """
    half = " at half the rate"
    lines = differences((f"{m}{half} − {m}", rates, f"{m}{half}", rates, m) for m in ("fleet", "LoRA r=8"))
    pairs = (("fleet", "LoRA r=8"), (f"fleet{half}", f"LoRA r=8{half}"))
    lines += differences((f"{a} − {b}", rates, a, rates, b) for a, b in pairs)
    lines += differences((f"{m}, run again − first run", rates, m, usual, m) for m in ("fleet", "LoRA r=8"))
    return [*DIFFERENCES, *lines]


def edges(found: Mapping[str, Rows]) -> list[str]:
    """Return how many sweeps' best rate is still the smallest or largest that was tried."""
    every = [row for rows in found.values() for tasks in rows.values() for row in tasks.values()]
    swept = [row for row in every if len(row["sweep"]) > 1]
    at_edge = sum(row["at_edge"] for row in swept)
    return [f"Sweeps whose best rate is still at an edge after widening: {at_edge} of {len(swept)}."]


def comparisons(rows: Rows) -> list[str]:
    """Return the fleet's row against every other, and the others against LoRA r=8 and random.

    Both kinds of tasks stand apart, too.
    """
    lines = [*DIFFERENCES]
    lines += differences((f"fleet − {b}", rows, "fleet", rows, b) for b in MAIN_ORDER if b != "fleet")
    lines += differences(
        (f"{a} − LoRA r=8", rows, a, rows, "LoRA r=8") for a in ("LoRA r=1", "VeRA r=384", "hybrid", "random")
    )
    lines += differences((f"{a} − random", rows, a, rows, "random") for a in ("hybrid", "eigenlora", "base weights"))
    every = rows.get("fleet", {})
    if not any(task in SENTIMENT for task in every):
        return lines
    for name, chosen in (("opinion", SENTIMENT), ("other", [task for task in every if task not in SENTIMENT])):
        pairs = ((f"{name} tasks: fleet − {b}", rows, "fleet", rows, b) for b in ("LoRA r=8", "LoRA r=1", "random"))
        lines += differences(pairs, chosen)
    return lines


def section(title: str, rows: Rows, order: Sequence[str], lines: list[str]) -> list[str]:
    return [f"### {title}", "", *score_table(rows, order), "", *lines, ""]


def energy_section(energy: Mapping[str, Any], found: Mapping[str, Rows]) -> list[str]:
    """Return left-out energy beside the score differences, tasks from least to most, and how well it ranks them."""
    kept = {task: entry["unseen"] for task, entry in energy["tasks_left_out"].items()}
    title = (
        f"Energy that a basis of the other tasks' adapters keeps of a task's own LoRA (k={energy['k']}; random"
        f" directions {energy['random']:.2%}), and what came of it"
    )
    columns, lines = [], []
    for name, words in (("one-rate", "usual rates"), ("main", "swept")):
        for other in ("LoRA r=8", "random"):
            if name in found and other in found[name]:
                rows = found[name]
                columns.append((f"fleet − {other}, {words}", difference(scores(rows, "fleet"), scores(rows, other))))
    out = [
        f"### {title}",
        "",
        f"| task | energy kept | {' | '.join(head for head, _ in columns)} |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for task in sorted(kept, key=lambda task: kept[task]):
        cells = [f"{each.tasks[task]:+.1f}" if task in each.tasks else "–" for _, each in columns]
        out.append(f"| {task} | {kept[task]:.1%} | {' | '.join(cells)} |")
    for head, each in columns:
        value, chance = agreement(kept, each)
        lines.append(
            f"- {head}: Spearman's correlation with the energy {value:+.2f}; {chance:.1%} of shufflings are as far"
            " from 0."
        )
    return [*out, "", *lines, ""]
