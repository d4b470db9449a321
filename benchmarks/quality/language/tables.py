"""Tables and a figure from the committed cells: `python benchmarks/quality/language/tables.py`.

Reads benchmarks/results/quality/language/*/*.json; writes tables.md and likelihoods.png there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

import common as shared  # noqa: E402

from benchmarks.quality.language.prompts import LABELS, ORDER, PHRASES  # noqa: E402
from benchmarks.quality.language.rows import MORE, TABLE  # noqa: E402
from benchmarks.quality.language.setting import ADAPTED, SWEEP_SEED  # noqa: E402
from benchmarks.quality.language.shares import shares_table  # noqa: E402
from benchmarks.quality.paired import difference  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "quality" / "language"
WORST = math.log(49152)  # nats of a guess among all tokens: what a run counts as that diverged
HEADROOM = 0.05  # nats that LoRA r=8 gains at least where a row's gain is held against it
TITLES = {"qv": "Query and value adapted", "linear": "All linear layers adapted"}

Cells = dict[str, dict[str, dict[int, dict[str, Any]]]]  # row → task → seed → result


def read(folder: Path) -> Cells:
    """Return the reported cells of a choice of modules."""
    found: Cells = {}
    for file in sorted(folder.glob("*.json")):
        body = json.loads(file.read_text(encoding="utf-8"))
        for cell in body["cells"]:
            if cell["seed"] != SWEEP_SEED:
                found.setdefault(cell["row"], {}).setdefault(body["task"], {})[cell["seed"]] = cell["result"]
    return found


def finished(cells: Cells) -> tuple[list[str], list[int], list[str]]:
    """Return (tasks, seeds, rows) of which every cell is there.

    A task counts where all rows of `TABLE` have a seed of it that is the lowest of all; a seed where they have it on
    all these tasks; a further row where it has all these cells.
    """

    def has(row: str, task: str, seed: int) -> bool:
        known = cells.get(row, {}).get(task, {})
        return bool(known) if row == "zero-shot" else seed in known

    every = sorted({seed for tasks in cells.values() for each in tasks.values() for seed in each})
    tasks = [task for task in ORDER if every and all(has(row, task, every[0]) for row in TABLE)]
    seeds = [seed for seed in every if tasks and all(has(row, task, seed) for row in TABLE for task in tasks)]
    further = [row for row in MORE if all(has(row, task, seed) for task in tasks for seed in seeds)]
    return tasks, seeds, [*TABLE, *further] if seeds else []


def likelihood(cells: Cells, row: str, task: str, seeds: Sequence[int]) -> list[float]:
    """Return the negative log-likelihood per answer token for each seed; untrained, it is the same for all."""
    each = cells[row][task]
    results = [next(iter(each.values()))] * len(seeds) if row == "zero-shot" else [each[seed] for seed in seeds]
    return [WORST if result["test"] is None else -result["test"] for result in results]


def metric(cells: Cells, row: str, task: str, seeds: Sequence[int], name: str) -> float | None:
    """Return the mean of a metric over seeds, or None where the task has none."""
    each = cells[row][task]
    results = list(each.values()) if row == "zero-shot" else [each[seed] for seed in seeds]
    values = [result["metrics"].get(name) for result in results]
    return None if None in values else sum(values) / len(values)


def render(cells: Cells, title: str) -> list[str]:
    """Return the section of a choice of modules: of the cells that `finished` names, and what is not finished."""
    tasks, seeds, rows = finished(cells)
    if not seeds:
        return [f"## {title}", "", "No held-out task is finished yet.", ""]
    lines = [f"## {title}", "", f"{len(tasks)} held-out tasks, seeds {', '.join(map(str, seeds))}."]
    if missing := [row for row in MORE if row not in rows]:
        lines.append(f"Not finished: {', '.join(missing)}.")
    if left := [task for task in ORDER if task not in tasks]:
        lines.append(f"Tasks not finished: {', '.join(left)}.")
    lines.append("")
    nll = {row: {task: likelihood(cells, row, task, seeds) for task in tasks} for row in rows}
    lines += ["### Negative log-likelihood per answer token, nats (lower is better)", ""]
    lines += _table(rows, {task: [_mean(nll[row][task]) for row in rows] for task in tasks}, 3, "mean")
    counts = ["0" if row == "zero-shot" else f"{_any(cells, row)['trained_adapter']:,}" for row in rows]
    lines += [f"| parameters | {' | '.join(counts)} |", ""]
    lines += _differences(nll, rows)
    labels, phrases = ([task for task in tasks if task in kind] for kind in (LABELS, PHRASES))
    for name, words, chosen, scale, digits in (
        ("choice_nll", "Negative log-likelihood of the right label word among the label words, nats", labels, 1, 3),
        ("choice", "Best of the label words by their first token, %", labels, 100, 1),
        ("exact_match", "Exact match of greedy answers, %", tasks, 100, 1),
        ("rougeL", "ROUGE-L of greedy answers, × 100", phrases, 100, 1),
    ):
        table = {task: [metric(cells, row, task, seeds, name) for row in rows] for task in chosen}
        shown = {task: [None if v is None else scale * v for v in values] for task, values in table.items()}
        if shown:
            lines += [f"### {words}", "", *_table(rows, shown, digits, "mean"), ""]
    return lines


def _differences(nll: Mapping[str, Mapping[str, Sequence[float]]], rows: Sequence[str]) -> list[str]:
    minus = {row: {task: [-value for value in values] for task, values in each.items()} for row, each in nll.items()}
    gains = {row: {task: _mean(nll["zero-shot"][task]) - _mean(nll[row][task]) for task in nll[row]} for row in rows}
    roomy = [task for task, gain in gains["LoRA r=8"].items() if gain >= HEADROOM]
    lines = [
        "### Gains in likelihood, hundredths of a nat per answer token (higher is better) [95 % interval]",
        "",
        f"Share: of LoRA r=8's gain over the untrained model, mean of the {len(roomy)} tasks where that gain is at"
        f" least {HEADROOM:g} nats. A run that diverged counts as a guess among all tokens.",
        "",
        "| row | over zero-shot | over random | over LoRA r=1 | over LoRA r=8 | share of LoRA r=8's gain |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = []
        for other in ("zero-shot", "random", "LoRA r=1", "LoRA r=8"):
            found = difference(minus[row], minus[other]) if other in minus and other != row else None
            cells.append("–" if found is None else f"{found}{' *' if found.beyond_noise else ''}")
        share = _mean([gains[row][task] / gains["LoRA r=8"][task] for task in roomy]) if roomy else math.nan
        lines.append(f"| {row} | {' | '.join(cells)} | {100 * share:.0f} % |")
    return [*lines, "", "\\* the interval leaves out zero.", ""]


def _any(cells: Cells, row: str) -> dict[str, Any]:
    return next(iter(next(iter(cells[row].values())).values()))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _table(rows: Sequence[str], values: Mapping[str, Sequence[float | None]], digits: int, last: str) -> list[str]:
    show = lambda value: "–" if value is None else f"{value:.{digits}f}"  # noqa: E731
    lines = [f"| task | {' | '.join(rows)} |", f"|---|{'---|' * len(rows)}"]
    lines += [f"| {task} | {' | '.join(map(show, each))} |" for task, each in values.items()]
    columns = list(zip(*values.values(), strict=True))
    means = [None if None in column else _mean(column) for column in columns]
    return [*lines, f"| **{last}** | {' | '.join(f'**{show(value)}**' for value in means)} |"]


def draw(found: Mapping[str, Cells], file: Path) -> bool:
    """Draw the mean gain over the untrained model against trained parameters; False where nothing is finished."""
    drawn = {}
    for targets, cells in found.items():
        tasks, seeds, rows = finished(cells)
        if seeds:
            means = {row: _mean([_mean(likelihood(cells, row, task, seeds)) for task in tasks]) for row in rows}
            drawn[targets] = {
                row: (_any(cells, row)["trained_adapter"], means["zero-shot"] - means[row])
                for row in rows
                if row != "zero-shot"
            }
    if not drawn:
        return False
    plt = shared.pyplot()
    figure, axes = plt.subplots(1, len(drawn), figsize=(5.6 * len(drawn), 4), squeeze=False)
    for axis, (targets, points) in zip(axes[0], drawn.items(), strict=True):
        for row, (count, gain) in points.items():
            axis.scatter(count, gain, color="#1f5fa8" if row.startswith(("fleet", "mean")) else "#777777")
            axis.annotate(row, (count, gain), textcoords="offset points", xytext=(5, 3), fontsize=8)
        axis.set(xscale="log", title=TITLES[targets], xlabel="trained parameters")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("gain over the untrained model, nats per answer token")
    shared.save_figure(figure, file, dpi=110)
    return True


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    found = {targets: cells for targets in ADAPTED if (cells := read(given.results / targets))}
    if not found:
        parser.error(f"{given.results} holds no cells: run `python benchmarks/quality/language/run.py` first")
    lines = [line for targets, cells in found.items() for line in render(cells, TITLES[targets])]
    title = "## Parameters on query and value, as shares of LoRA r=8's (by arithmetic)"
    text = "\n".join([*lines, title, "", *shares_table()]) + "\n"
    (given.results / "tables.md").write_text(text, encoding="utf-8")
    draw(found, given.results / "likelihoods.png")
    print(text)


if __name__ == "__main__":
    main()
