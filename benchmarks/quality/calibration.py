"""Does the report's verdict predict? What weights say of new tasks, held against what training then gives.

    python benchmarks/quality/calibration.py --measure   # the text and image fleets' weights; minutes, no new training
    python benchmarks/quality/calibration.py             # table and figure from the committed results

`--measure` reads the fleets' adapters from the cache (trains those that are missing) and writes verdict.json; the
families' weights are measured by `run.py families-weights`. Writes calibration.md and calibration.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

import common as shared  # noqa: E402

from benchmarks.quality.families.cells import K  # noqa: E402
from benchmarks.quality.families.found import Which, read  # noqa: E402
from benchmarks.quality.families.tables import LORA, NEAR, table  # noqa: E402
from subspace_peft._io.atomic import write_text_aside  # noqa: E402
from subspace_peft.basis.cache import cache_home  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "quality"
CLASSES = ("unrelated", "little", "part", "mostly")
ADVISED = ("part", "mostly")  # classes in which the verdict tells to train in the basis
MEASURES = ("left_out", "own", "quick")
ABOUT = {
    "left_out": "of sources left out, by the report",
    "own": "of the new task's own LoRA",
    "quick": "of a LoRA on 100 of its examples",
}


@dataclass(frozen=True)
class Point:
    """A held-out task in a fleet: what its weights say, and what training gave.

    Attributes:
        group: family, or kind of fleet.
        task: held-out task.
        sources: how many made the basis.
        mixed: whether they are of other families.
        said: the verdict's class.
        kept: measure → share of energy, of those that are known.
        gains: other row → mean over seeds of the core minus it, in points.
    """

    group: str
    task: str
    sources: int
    mixed: bool
    said: str
    kept: Mapping[str, float]
    gains: Mapping[str, float]


def family_points(folder: Path, examples: int) -> list[Point]:
    """Return a point per family, held-out member and fleet; weights and scores are means over seeds."""
    points = []
    for name, found in read(folder).items():
        cells: dict[tuple[str, int, bool], list[dict[str, Any]]] = {}
        for each in found.facts.get("energies", []):
            cells.setdefault((each["member"], each["sources"], each["mixed"]), []).append(each)
        for (member, count, mixed), listed in cells.items():
            core = found.scores(found.core(examples, count, mixed=mixed))
            gains = {}
            for other in (Which(LORA, examples), Which("random", examples, K)):
                beside = found.scores(other)
                both = [place for place in core if place in beside and place[0] == member]
                if both:
                    gains[other.row] = 100 * statistics.fmean((core[p] or 0.0) - (beside[p] or 0.0) for p in both)
            if len(gains) == 2:
                kept = {
                    m: statistics.fmean(e[m] for e in listed)
                    for m in MEASURES
                    if all(e[m] is not None for e in listed)
                }
                said = statistics.mode(e["class"] for e in listed)
                points.append(Point(name, member, count, mixed, said, kept, gains))
    return points


def fleet_points(results: Path) -> list[Point]:
    """Return a point per held-out task of the text and image fleets, with 300 examples."""
    file = results / "verdict.json"
    points = []
    for kind, tasks in (json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}).items():
        rows = _rows(results, "one-rate" if kind == "text" else "images")
        for task, said in tasks.items():
            if task in rows:
                tests = {row["method"]: row["tests"] for row in rows[task]}
                gains = {
                    other: 100
                    * float(
                        np.mean([(a or 0.0) - (b or 0.0) for a, b in zip(tests["fleet"], tests[other], strict=True)])
                    )
                    for other in (LORA, "random")
                }
                kept = {m: said[m] for m in MEASURES if said.get(m) is not None}
                points.append(Point(f"{kind} fleet", task, said["sources"], False, said["class"], kept, gains))
    return points


def _rows(results: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    """Return task → rows of an experiment, of the runs with the same head treatment where they are there."""
    for file in (results / "same-head" / f"{name}.json", results / f"{name}.json"):
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))["tasks"]
    return {}


def measure(cache: Path, file: Path) -> None:
    """Write what the weights of the text and image fleets say of each held-out task."""
    from benchmarks.quality.bench import Bench
    from benchmarks.quality.families.facts import QUICK, energy_kept, outlook_of
    from benchmarks.quality.fleet import source
    from benchmarks.quality.order import IMAGE_TASKS, ORDER

    bench, body = Bench(cache), {}
    for kind, listed in (("text", ORDER), ("image", IMAGE_TASKS)):
        body[kind] = {}
        for task in listed:
            basis = bench.basis(task, leave_one_out=True)
            body[kind][task] = {
                **outlook_of(basis),
                "sources": len(basis.info["sources"]),
                "own": round(energy_kept(basis, bench.source(task)), 5),
                "quick": round(energy_kept(basis, source(task, cache, budget=QUICK)), 5),
            }
            write_text_aside(file, json.dumps(body, indent=1) + "\n")


def pays(point: Point) -> bool:
    """Return whether the core ended level with LoRA r=8, or ahead."""
    return point.gains[LORA] >= -NEAR


def hits(points: Sequence[Point], told: Sequence[bool]) -> str:
    """Return how often a prediction that the basis pays was right: of all, of its yes, and of its no."""
    right = [pays(p) == t for p, t in zip(points, told, strict=True)]
    yes = [r for r, t in zip(right, told, strict=True) if t]
    no = [r for r, t in zip(right, told, strict=True) if not t]
    shown = [f"{100 * sum(each) / len(each):.0f} % of {len(each)}" if each else "–" for each in (right, yes, no)]
    return " | ".join(shown)


def threshold(points: Sequence[Point], measure: str) -> float:
    """Return the share of energy from which on a basis that pays is told best: by most hits, the lowest of equals."""
    shares = sorted({p.kept[measure] for p in points})
    places = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(shares)), 1.01]
    return max(places, key=lambda at: (sum(pays(p) == (p.kept[measure] >= at) for p in points), -at))


def left_out_thresholds(points: Sequence[Point], measure: str) -> list[bool]:
    """Return per point what a threshold chosen on the other groups predicts."""
    at = {g: threshold([p for p in points if p.group != g], measure) for g in {p.group for p in points}}
    return [p.kept[measure] >= at[p.group] for p in points]


def class_lines(points: Sequence[Point]) -> list[list[str]]:
    """Return a line per class of the verdict: how many, and what training gave."""
    lines = []
    for name in CLASSES:
        some = [p for p in points if p.said == name]
        if some:
            means = [f"{statistics.fmean(p.gains[other] for p in some):+.1f}" for other in (LORA, "random")]
            shares = [sum(map(pays, some)), sum(p.gains["random"] >= NEAR for p in some)]
            lines.append([name, str(len(some)), *means, *(f"{100 * share / len(some):.0f} %" for share in shares)])
    return lines


def spearman(points: Sequence[Point], measure: str, other: str) -> float | None:
    """Return the rank correlation over points; None for fewer than three, or the same value for all."""
    from scipy.stats import rankdata

    a, b = rankdata([p.kept[measure] for p in points]), rankdata([p.gains[other] for p in points])
    if len(points) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def render(points: Sequence[Point], examples: int) -> str:
    """Return the tables as Markdown."""
    groups = list(dict.fromkeys(p.group for p in points))
    head = ["the verdict's class", "tasks × fleets", f"core − {LORA}", "core − random"]
    out = [f"### What the verdict says, and what came of it, {examples} examples", ""]
    out += table([*head, f"level with {LORA} or ahead", f"ahead of random by {NEAR:g}"], class_lines(points))
    lines = []
    told = {"the verdict: part or mostly": (points, [p.said in ADVISED for p in points])}
    told["always yes"] = (points, [True] * len(points))
    told["always no"] = (points, [False] * len(points))
    for each in MEASURES:
        known = [p for p in points if each in p.kept]
        if len({p.group for p in known}) > 1:
            at = threshold(known, each)
            words = f"energy kept {ABOUT[each]}, threshold chosen on other families (on all: {at:.1%})"
            told[words] = (known, left_out_thresholds(known, each))
    for words, (some, guess) in told.items():
        lines.append([words, hits(some, guess)])
    out += [f"### How often it is right that the basis pays (level with {LORA} or ahead)", ""]
    out += table(["told by", "right", "right where yes", "right where no"], lines)
    lines = []
    for each in MEASURES:
        for group in ["all", *groups]:
            some = [p for p in points if each in p.kept and group in ("all", p.group)]
            values = [spearman(some, each, other) for other in (LORA, "random")]
            lines.append(
                [
                    f"energy kept {ABOUT[each]}",
                    group,
                    str(len(some)),
                    *("–" if v is None else f"{v:+.2f}" for v in values),
                ]
            )
    out += ["### Does energy rank tasks and fleets? Spearman's correlation", ""]
    out += table(["", "of", "points", f"with core − {LORA}", "with core − random"], lines)
    lines = [
        [p.group + (" (others' adapters)" if p.mixed else ""), p.task, str(p.sources), p.said]
        + [f"{p.kept[m]:.1%}" if m in p.kept else "–" for m in MEASURES]
        + [f"{p.gains[other]:+.1f}" for other in (LORA, "random")]
        for p in points
    ]
    out += ["### Every task in every fleet", ""]
    out += table(
        ["fleet", "task", "N", "class", *(f"kept {ABOUT[m]}" for m in MEASURES), f"core − {LORA}", "core − random"],
        lines,
    )
    return "\n".join(out)


def draw(points: Sequence[Point], file: Path) -> None:
    """Draw score differences against the energy kept, a colour per group."""
    plt = shared.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for axis, other in zip(axes, (LORA, "random"), strict=True):
        for group in dict.fromkeys(p.group for p in points):
            some = [p for p in points if p.group == group and p.kept.get("left_out")]
            axis.scatter([100 * p.kept["left_out"] for p in some], [p.gains[other] for p in some], s=12, label=group)
        axis.axhline(0, color="black", lw=0.8)
        axis.set(xscale="log", xlabel="energy kept of sources left out, %", ylabel=f"core − {other}, points")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    shared.save_figure(figure, file, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure the text and image fleets' weights first")
    parser.add_argument("--cache", type=Path, default=cache_home() / "quality", help="as of run.py")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--examples", type=int, default=300, help="training examples of the families' runs")
    given = parser.parse_args(arguments)
    if given.measure:
        measure(given.cache, given.results / "verdict.json")
    points = [*fleet_points(given.results), *family_points(given.results / "families", given.examples)]
    if not points:
        parser.error(
            f"{given.results} holds no weights beside scores: run with --measure, and `run.py families-weights`"
        )
    page = render(points, given.examples)
    (given.results / "calibration.md").write_text(page, encoding="utf-8")
    draw(points, given.results / "calibration.png")
    print(page)


if __name__ == "__main__":
    main()
