"""Tables and a figure of the families: `python benchmarks/quality/families/tables.py`.

Reads benchmarks/results/quality/families/*.json; writes tables.md and curves.png there.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

import common as shared  # noqa: E402

from benchmarks.quality.families.cells import Cell, K  # noqa: E402
from benchmarks.quality.families.found import EXAMPLES, Found, Which, pooled, read  # noqa: E402
from benchmarks.quality.paired import Difference  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "quality" / "families"
SHOWN = (100, 300)
HEADROOM = 3.0  # points that LoRA r=8 gains over the head alone, below which a task shows nothing
NEAR = 0.5  # points behind LoRA r=8 that count as level
BINS = (0.0, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0)  # shares of energy
LORA = "LoRA r=8"


def shown(found: Difference | None) -> str:
    """Return a difference as a cell of a table, with a star where both of its intervals leave out zero.

    That is the bootstrap's, which is shown, and the one by t over tasks: of four tasks the first alone is too narrow.
    """
    if found is None:
        return "–"
    low, high = span(found)
    return f"{found}{' *' if low > 0 or high < 0 else ''}"


def span(found: Difference) -> tuple[float, float]:
    """Return the lower and upper ends of both intervals of a difference, whichever lies further out."""
    by_t = found.by_t
    return (found.low, found.high) if by_t is None else (min(found.low, by_t[0]), max(found.high, by_t[1]))


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Return a Markdown table."""
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(line)} |" for line in lines), ""]


def families_table(every: Mapping[str, Found]) -> list[str]:
    """Return what each family is, and how much there is to gain on it."""
    lines = []
    for name, found in every.items():
        gains = [100 * (each["source"] - each["head"]) for each in found.facts.get("headroom", {}).values()]
        gain = f"{statistics.fmean(gains):+.1f}; {sum(g >= HEADROOM for g in gains)} of {len(gains)}" if gains else "–"
        held = [shown(found.minus(Which(LORA, n), Which("head only", n))) for n in SHOWN]
        members = len(found.facts["members"])
        lines.append([name, found.facts["about"], str(members), ", ".join(found.facts["held_out"]), gain, *held])
    head = [
        "family",
        "a task tells",
        "members",
        "held out",
        f"sources: gain over the head, points; at least {HEADROOM:g}",
    ]
    return table([*head, *(f"held out: {LORA} − head only, {n} examples" for n in SHOWN)], lines)


def curve_table(every: Mapping[str, Found], examples: int, against: str) -> list[str]:
    """Return the core at K minus another row by the number of related sources, per family and over all."""
    counts = sorted({count for found in every.values() for count in found.counts()})
    other = Which(against, examples, K if against == "random" else 0)
    lines = []
    for name, found in every.items():
        lines.append([name, *(shown(found.minus(found.core(examples, n), other)) for n in counts)])
    parts = [pooled([(f, f.core(examples, n), other) for f in every.values() if n in f.counts()]) for n in counts]
    lines.append(["**all that have so many**", *map(shown, parts)])
    return table([f"core k={K} − {against}", *(f"N = {n}" for n in counts)], lines)


def enough(found: Found, examples: int, against: str, least: float) -> str:
    """Return the smallest N from which on the core minus another row is at least `least` points."""
    other, first = Which(against, examples, K if against == "random" else 0), None
    counts = found.counts()
    for count in reversed(counts):
        each = found.minus(found.core(examples, count), other)
        if each is None or each.mean < least:
            break
        first = count
    return str(first) if first else f"not by {counts[-1]}" if counts else "–"


def answer_table(every: Mapping[str, Found]) -> list[str]:
    """Return from how many related adapters on the basis is worth it, per family and number of examples."""
    lines = []
    for name, found in every.items():
        for examples in EXAMPLES:
            if found.scores(Which(LORA, examples)):
                most = found.counts()[-1]
                kept = related(found, most)
                lines.append(
                    [
                        name,
                        str(examples),
                        enough(found, examples, "random", NEAR),
                        enough(found, examples, LORA, -NEAR),
                        enough(found, examples, LORA, NEAR),
                        "–" if kept is None else f"{100 * kept:.1f} %",
                        shown(found.minus(found.core(examples, most), Which(LORA, examples))),
                    ]
                )
    head = ["family", "examples", f"N to be ahead of random by {NEAR:g}", f"N to be level with {LORA}"]
    return table(
        [*head, f"N to be ahead of {LORA}", "energy kept of a held-out LoRA, all N", f"core − {LORA}, all N"], lines
    )


def related(found: Found, count: int, measure: str = "own") -> float | None:
    """Return the mean share that bases of `count` sources keep of held-out members' LoRAs; None where unknown."""
    known = [e[measure] for e in found.facts.get("energies", []) if e["sources"] == count and not e["mixed"]]
    return statistics.fmean(known) if known else None


def relatedness_table(every: Mapping[str, Found], measure: str) -> list[str]:
    """Return score differences by the energy that a basis keeps: every held-out member, N and seed counts once."""
    lines = []
    for low, high in itertools.pairwise(BINS):
        cells: dict[str, list[float]] = {}
        for found in every.values():
            for each in found.facts.get("energies", []):
                if low <= each[measure] < high or (high == 1.0 and each[measure] == 1.0):
                    for examples in SHOWN:
                        core = found.scores(found.core(examples, each["sources"], mixed=each["mixed"]))
                        for against, k in ((LORA, 0), ("random", K)):
                            place = (each["member"], each["seed"])
                            a, b = core.get(place), found.scores(Which(against, examples, k)).get(place)
                            if a is not None and b is not None:
                                cells.setdefault(f"{against} {examples}", []).append(100 * (a - b))
        if cells:
            means = [cells.get(f"{against} {n}", []) for against in (LORA, "random") for n in SHOWN]
            lines.append(
                [
                    f"{100 * low:.0f}–{100 * high:.0f} %",
                    str(max(map(len, means))),
                    *(f"{statistics.fmean(each):+.1f}" if each else "–" for each in means),
                ]
            )
    words = {"own": "a LoRA of the held-out task", "quick": "a LoRA trained on 100 of its examples"}[measure]
    columns = [f"core − {against}, {n} examples" for against in (LORA, "random") for n in SHOWN]
    return table([f"energy kept of {words}", "bases", *columns], lines)


def score_rows(found: Found, examples: int) -> list[tuple[str, Which]]:
    """Return the rows of a family's table of scores, named."""
    counts = found.counts()
    rows = [(row, Which(row, examples)) for row in ("head only", LORA, "LoRA r=1", "VeRA")]
    rows += [(f"{row} k={k}", Which(row, examples, k)) for row in ("random", "base weights") for k in (8, 16, 32)]
    if counts:
        most = counts[-1]
        rows.append((f"mean core only, N={most}", Which("mean only", examples, min(K, 8 * most), most)))
    rows += [(f"core k={k}, N={n}", Which("core", examples, k, n)) for k in (8, 16, 32) for n in counts if k <= 8 * n]
    return rows + [
        (f"core k={K}, N={n} of other families", found.core(examples, n, mixed=True)) for n in found.counts(True)
    ]


def rows_table(every: Mapping[str, Found]) -> list[str]:
    """Return all rows' mean scores and their gains over the head, per family and number of examples."""
    lines = []
    for name, found in every.items():
        for examples in EXAMPLES:
            for words, which in score_rows(found, examples):
                if (points := found.points(which)) is not None:
                    against = [found.minus(which, Which(row, examples)) for row in ("head only", LORA)]
                    trained = next(run["trained"] for cell, run in found.runs.items() if _is(cell, which))
                    lines.append([name, str(examples), words, f"{points:.1f}", f"{trained:,}", *map(shown, against)])
    return table(["family", "examples", "row", "score", "trained", "− head only", f"− {LORA}"], lines)


def _is(cell: Cell, which: Which) -> bool:
    return Which(cell.row, cell.examples, cell.k, cell.sources, cell.mixed) == which


def mixed_table(every: Mapping[str, Found]) -> list[str]:
    """Return the control: sources of other families, beside random directions and as many related sources."""
    lines = []
    for name, found in every.items():
        for examples in SHOWN:
            for count in found.counts(True):
                mixed = found.core(examples, count, mixed=True)
                against = [Which("random", examples, K), found.core(examples, count), Which(LORA, examples)]
                lines.append([name, str(examples), str(count), *(shown(found.minus(mixed, each)) for each in against)])
    head = ["family", "examples", "N of other families", "− random", "− as many of its own family", f"− {LORA}"]
    return table(head, lines)


def rates_table(every: Mapping[str, Found]) -> list[str]:
    """Return each row's rate."""
    rates = {name: {cell.row: cell.rate for cell in found.runs} for name, found in every.items()}
    rows = list(dict.fromkeys(row for each in rates.values() for row in each))
    return table(
        ["rate", *rows],
        [[name, *(f"{each[row]:g}" if row in each else "–" for row in rows)] for name, each in rates.items()],
    )


def render(every: Mapping[str, Found]) -> str:
    """Return all tables as Markdown."""
    seeds = sorted({cell.seed for found in every.values() for cell in found.runs})
    out = ["### Families", "", *families_table(every)]
    out += ["### How many related adapters make a basis worth it", "", *answer_table(every)]
    out += ["### How related they have to be", ""]
    for measure in ("own", "quick"):
        out += relatedness_table(every, measure)
    for examples in SHOWN:
        out += [f"### By the number of related sources, {examples} examples", ""]
        for against in (LORA, "random"):
            out += curve_table(every, examples, against)
    out += ["### Adapters of other families", "", *mixed_table(every)]
    out += ["### All rows", "", *rows_table(every)]
    out += ["### Learning rates", "", *rates_table(every)]
    out += [
        f"Seeds {', '.join(map(str, seeds))}. \\* both intervals leave out zero: the bootstrap's, and by t over tasks."
    ]
    return "\n".join(out) + "\n"


def draw(every: Mapping[str, Found], file: Path) -> None:
    """Draw the core minus LoRA r=8 against the number of related sources, and against the number of examples."""
    plt = shared.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), sharey=True)
    for place, (name, found) in enumerate(every.items()):
        for axis, examples in zip(axes, SHOWN, strict=False):
            points = [
                (n, d) for n in found.counts() if (d := found.minus(found.core(examples, n), Which(LORA, examples)))
            ]
            bars(axis, points, name, place)
        most = found.counts()[-1:]
        points = [
            (n, d) for count in most for n in EXAMPLES if (d := found.minus(found.core(n, count), Which(LORA, n)))
        ]
        bars(axes[2], points, name, place)
    titles = [*(f"{n} examples" for n in SHOWN), "all related sources"]
    labels = ["related sources N", "related sources N", "training examples"]
    for axis, title, label in zip(axes, titles, labels, strict=True):
        axis.axhline(0, color="black", lw=0.8)
        axis.set(xscale="log", title=title, xlabel=label)
        axis.grid(alpha=0.3)
    for axis in axes[:2]:
        axis.set_xticks([2, 4, 8, 16, 32], ["2", "4", "8", "16", "32"], minor=False)
    axes[2].set_xticks(EXAMPLES, [str(n) for n in EXAMPLES], minor=False)
    axes[0].set_ylabel(f"core k={K} − {LORA}, points")
    axes[0].legend(fontsize=8)
    shared.save_figure(figure, file, dpi=110)


def bars(axis: Any, points: Sequence[tuple[int, Difference]], name: str, place: int) -> None:
    """Draw one family's line, its intervals a little apart from those of the others."""
    if points:
        x = [n * 1.03**place for n, _ in points]
        y = [d.mean for _, d in points]
        ends = [span(d) for _, d in points]
        errors = [[d.mean - low for (_, d), (low, _) in zip(points, ends, strict=True)]]
        errors.append([high - d.mean for (_, d), (_, high) in zip(points, ends, strict=True)])
        axis.errorbar(x, y, yerr=errors, marker="o", ms=4, capsize=2, lw=1.2, label=name)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    every = read(given.results)
    if not every:
        parser.error(f"{given.results} holds no runs: run `python benchmarks/quality/run.py families` first")
    tables = render(every)
    (given.results / "tables.md").write_text(tables, encoding="utf-8")
    draw(every, given.results / "curves.png")
    print(tables)


if __name__ == "__main__":
    main()
