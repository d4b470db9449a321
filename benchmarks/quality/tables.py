"""Tables and figures from the committed results: `python benchmarks/quality/tables.py`.

Reads benchmarks/results/quality/*.json; writes tables.md, scores.png and differences.png there, and the generated part
of docs/evidence-tables.md and of the pages beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

import common as shared  # noqa: E402

from benchmarks.quality.generated import EVIDENCE, fill, markers, replaced  # noqa: E402
from benchmarks.quality.own_directions import own_section  # noqa: E402
from benchmarks.quality.paired import difference, mean_score  # noqa: E402
from benchmarks.quality.same_head import FOLDER  # noqa: E402
from benchmarks.quality.same_head_tables import LORA, ROWS, same_head_sections, trial_table, trials_of  # noqa: E402
from benchmarks.quality.sections import (  # noqa: E402
    DIFFERENCES,
    MAIN_ORDER,
    Rows,
    ablation_lines,
    comparisons,
    differences,
    edges,
    energy_section,
    rate_lines,
    rates_table,
    reached_table,
    scores,
    section,
    transfer_table,
    worst_seeds,
)
from benchmarks.quality.summary import summary  # noqa: E402
from benchmarks.quality.tasks import SENTIMENT  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "quality"
PAGE = ROOT / "docs" / "evidence-tables.md"
EARLIER = "Earlier benchmark: the head's rate 5e-3 beside adapters"
EARLIER_PAGE = "evidence-earlier-tables.md"
SCRIPT = "benchmarks/quality/tables.py"
STARRED = "\\* the interval leaves out zero."


def read(folder: Path) -> dict[str, Rows]:
    """Return experiment → method → task → row; ``main`` has the rows of ``main-more`` and ``main-rest`` too."""
    found: dict[str, Rows] = {}
    for file in sorted(folder.glob("*.json")):
        body = json.loads(file.read_text(encoding="utf-8"))
        if "experiment" not in body:
            continue
        rows: Rows = found.setdefault(body["experiment"].removesuffix("-more").removesuffix("-rest"), {})
        for task, listed in body["tasks"].items():
            for row in listed:
                rows.setdefault(row["method"], {})[task] = row
    return found


def render(
    found: Mapping[str, Rows], energy: Mapping[str, Any] | None = None, same_head: Mapping[str, Rows] | None = None
) -> str:
    """Return all tables as Markdown.

    Args:
        found: experiments of the earlier benchmark, whose tables are left out where it has no ``main``.
        energy: what energy.json holds.
        same_head: experiments under one treatment of heads.
    """
    return together(same_head_sections(same_head or {}), earlier(found, energy) if "main" in found else [])


def together(ours: Sequence[str], before: Sequence[str]) -> str:
    """Return the tables of this benchmark and of the earlier one, whose last lines explain the stars, as Markdown."""
    return "\n".join([*ours, *(before or [STARRED])]) + "\n"


def earlier(found: Mapping[str, Rows], energy: Mapping[str, Any] | None) -> list[str]:
    """Return the tables of what was measured before heads were treated alike, under a heading that says so."""
    main = found["main"]
    count = len({task for tasks in main.values() for task in tasks})
    out = [
        f"## {EARLIER}",
        "",
        "The row of the head alone sweeps its rate; rates are chosen by one seed; there is one random basis.",
        "",
    ]
    out += section(
        f"{count} text tasks, 300 training examples, every row's rate swept on the task",
        main,
        MAIN_ORDER,
        comparisons(main),
    )
    out += [
        "### Speed: runs within a point of LoRA r=8's final validation score",
        "",
        *reached_table(main, MAIN_ORDER),
        "",
    ]
    # rows of one rate are held against rows of one rate
    usual = found.get("one-rate", main)
    if "one-rate" in found:
        title = "The same without a sweep: every row at the rate that was best on the other tasks"
        out += section(title, usual, MAIN_ORDER, comparisons(usual))
    for name, rows in sorted(found.items()):
        if name.startswith("examples-"):
            out += section(f"{name.removeprefix('examples-')} training examples", rows, MAIN_ORDER, comparisons(rows))
    for name, rows in sorted(found.items()):
        if name.startswith("size-"):
            k = name.removeprefix("size-")
            lines = [*DIFFERENCES, *differences([(f"fleet k={k} − random k={k}", rows, "fleet", rows, "random")])]
            others = ("fleet", "LoRA r=1", "VeRA r=384", "LoRA r=8")
            lines += differences(
                (f"fleet k={k} − {b}{' k=16' * (b == 'fleet')}", rows, "fleet", main, b) for b in others
            )
            out += section(f"k = {k}, rates swept", rows, MAIN_ORDER, lines)
    for name, words, beside in (
        ("own-directions-one-rate", "at usual rates", usual),
        ("own-directions", "rates swept", main),
    ):
        if name in found:
            out += own_section(f"Directions of a task's own beside the basis, {words}", found[name], beside)
    if energy is not None:
        out += energy_section(energy, found)
    if "controls" in found:
        rows = found["controls"]
        lines = differences((f"{a} − {b}", rows, a, usual, b) for a in rows for b in ("random", "fleet"))
        out += section("Negative controls, at the fleet row's rate", rows, list(rows), [*DIFFERENCES, *lines])
    if "images" in found:
        rows = found["images"]
        out += section(
            f"{len(next(iter(rows.values())))} image tasks, 300 training examples, rates swept",
            rows,
            MAIN_ORDER,
            comparisons(rows),
        )
    if "longer" in found:
        rows = found["longer"]
        any_row = next(iter(rows["fleet"].values()))
        title = f"{any_row['curves'][0][-1][0]} steps, {len(rows['fleet'])} tasks, 300 training examples, rates swept"
        out += section(title, rows, MAIN_ORDER, [*comparisons(rows), "", *reached_table(rows, MAIN_ORDER)])
    if lines := ablation_lines(found, main, usual):
        title = "Ablations: each variant minus the fleet row, same tasks, same rate (a and h: rates swept)"
        out += [f"### {title}", "", *DIFFERENCES, *lines, ""]
    if (rates := found.get("ablation-g-rates")) is not None:
        out += section("Usual rates and half of them", rates, list(rates), rate_lines(rates, usual))
    fast = {
        words: found[name]["fleet at 4 × the rate"]
        for name, words in (("fast", "without a limit"), ("fast-clipped", "gradients cut to norm 1"))
        if name in found
    }
    if fast:
        a, b = "gradients cut to norm 1", "without a limit"
        lines = [*worst_seeds(fast), "", *DIFFERENCES, *differences([(f"{a} − {b}", fast, a, fast, b)])]
        rate = next(iter(next(iter(fast.values())).values()))["rate"]
        out += section(f"The fleet's row at {rate:g}, four times its usual rate", fast, list(fast), lines)
    sizes = [(f"k = {k}", found[f"size-{k}"]) for k in (8, 28) if f"size-{k}" in found]
    listed = [*sizes[:1], ("k = 16", main), *sizes[1:], ("images, k = 16", found.get("images", {}))]
    out += ["### Mean validation score of the fleet's row by learning rate", "", *transfer_table(listed), ""]
    out += ["### Learning rates chosen on validation", "", *rates_table(found), ""]
    return [*out, STARRED, "", *edges(found)]


def draw(main: Rows, folder: Path) -> None:
    """Draw the figures of a main table.

    scores.png has the mean score against parameters, differences.png the fleet minus LoRA r=8 and random, per task.
    """
    plt = shared.pyplot()
    methods = [method for method in (*ROWS, "base weights") if method in main]
    common = [task for task in main[methods[0]] if all(task in main[m] for m in methods)]
    figure, axis = plt.subplots(figsize=(6.4, 4))
    for method in methods:
        x, y = main[method][common[0]]["trained"], mean_score(scores(main, method), common)
        ours = method.split()[0] in ("fleet", "hybrid", "eigenlora")
        axis.scatter(max(x, 0.5), y, color="#1f5fa8" if ours else "#777777")
        axis.annotate(method, (max(x, 0.5), y), textcoords="offset points", xytext=(5, 3), fontsize=8)
    axis.set(
        xscale="symlog",
        xlabel="trained numbers beside the head",
        ylabel=f"mean test score of {len(common)} tasks, points",
    )
    axis.grid(alpha=0.3)
    shared.save_figure(figure, folder / "scores.png", dpi=110)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), sharey=True)
    for axis, other in zip(axes, ("LoRA r=8", "random"), strict=True):
        both = difference(scores(main, "fleet"), scores(main, other))
        tasks = sorted(both.tasks, key=both.tasks.__getitem__)
        axis.barh(
            range(len(tasks)),
            [both.tasks[t] for t in tasks],
            color=["#1f5fa8" if t in SENTIMENT else "#c07a2c" for t in tasks],
        )
        for place, task in enumerate(tasks):
            axis.annotate(task, (0, place), textcoords="offset points", xytext=(3, -3), fontsize=7)
        axis.axvline(0, color="black", lw=0.8)
        axis.set(title=f"fleet − {other}: {both}", xlabel="points", yticks=[])
    shared.save_figure(figure, folder / "differences.png", dpi=110)


def short_tables(same_head: Mapping[str, Rows]) -> dict[str, list[str]]:
    """Return the tables of the evidence's page: name → lines."""
    names = {"main": "text", "images": "image"}
    found = {words: summary(same_head[name]) for name, words in names.items() if LORA in same_head.get(name, {})}
    return {**found, "heads": trial_table(trials)} if (trials := trials_of(same_head)) else found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    about = f"page whose generated part is replaced; so are the short tables of {EVIDENCE} beside it"
    parser.add_argument("--page", type=Path, default=PAGE, help=about)
    given = parser.parse_args(arguments)
    found, same_head = read(given.results), read(given.results / FOLDER)
    if "main" not in found and "main" not in same_head:
        parser.error(f"{given.results} holds no main.json: run `python benchmarks/quality/run.py` first")
    measured = given.results / "energy.json"
    energy = json.loads(measured.read_text(encoding="utf-8")) if measured.is_file() else None
    ours, before = same_head_sections(same_head), earlier(found, energy) if "main" in found else []
    tables = together(ours, before)
    (given.results / "tables.md").write_text(tables, encoding="utf-8")
    draw(same_head["main"] if "main" in same_head else found["main"], given.results)
    old = given.page.with_name(EARLIER_PAGE)
    if old.is_file():
        # one page of all would take a browser too long
        fill(old, SCRIPT, {"earlier": before})
    if given.page.is_file():
        shown = together(ours, []) if old.is_file() else tables
        page = replaced(given.page.read_text(encoding="utf-8"), shown, markers(SCRIPT))
        given.page.write_text(page, encoding="utf-8")
    if (brief := given.page.with_name(EVIDENCE)).is_file():
        fill(brief, SCRIPT, short_tables(same_head))
    print(tables)


if __name__ == "__main__":
    main()
