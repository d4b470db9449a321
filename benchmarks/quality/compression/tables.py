"""Tables and figures of what compression keeps: `python benchmarks/quality/compression/tables.py`.

Reads benchmarks/results/quality/compression/*.json; writes tables.md, bytes.png and energy.png there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

from benchmarks.quality.compression import function  # noqa: E402
from benchmarks.quality.compression.advice import advice_section  # noqa: E402
from benchmarks.quality.compression.compared import Row, best_within, by_group, fewest, read, rows_of  # noqa: E402
from benchmarks.quality.compression.figures import draw  # noqa: E402
from benchmarks.quality.paired import difference  # noqa: E402
from benchmarks.quality.sections import difference_line  # noqa: E402
from subspace_peft.energy import FAITHFUL, PARTIAL  # noqa: E402

Found = Mapping[str, tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]]  # by fleet: trained, cells
RESULTS = ROOT / "benchmarks" / "results" / "quality" / "compression"
LEVEL, TIMES = 0.99, 20.0  # the aim: so much of the mean score in so many times fewer bytes
LEVELS = (0.995, LEVEL, 0.97, 0.95)
CHOICES = "choices"  # what the files of what a fleet's owner can do beforehand begin with
HEAD = (
    "seeds",
    "bytes per adapter",
    "times fewer",
    "score",
    "of LoRA's",
    "against LoRA [95 %]",
    "gain left",
    "loss",
    "same answers",
    "change",
    "energy",
)


def line(row: Row) -> str:
    """Return a row of the long table."""
    cells = (
        row.label,
        str(row.seeds),
        f"{row.bytes / row.adapters:,.0f}",
        f"{row.times:.1f}",
        f"{100 * row.share * _mean(row):.1f}",
        f"{100 * row.share:.1f} %",
        f"{row.lost}{' *' if row.lost.beyond_noise else ''}",
        f"{100 * row.gain_left:.0f} %",
        f"{row.loss:.3f}",
        f"{100 * row.same:.1f} %",
        f"{row.change:.2f}",
        f"{100 * row.kept:.1f} %",
    )
    return f"| {' | '.join(cells)} |"


def _mean(row: Row) -> float:
    values = [value or 0.0 for each in row.lora.values() for value in each]
    return sum(values) / len(values)


def aim_lines(rows: Sequence[Row]) -> list[str]:
    """Return, per way to store a fleet, the fewest bytes at each level, chosen on the validation split."""
    shown = [f"≥ {100 * level:g} %" for level in LEVELS]
    lines = [
        f"| times fewer bytes at | {' | '.join(shown)} | score at {TIMES:g} × |",
        f"|---|{'---|' * (len(shown) + 1)}",
    ]
    for name, some in by_group(rows).items():
        cells = [_reached(fewest(some, level)) for level in LEVELS]
        small = best_within(some, TIMES)
        cells.append("–" if small is None else f"{100 * small.share:.1f} % ({small.label}, {small.times:.1f} ×)")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _reached(row: Row | None) -> str:
    return "–" if row is None else f"{row.times:.1f} ({row.label}; test {100 * row.share:.1f} %)"


def aim_sentence(rows: Sequence[Row]) -> str:
    """Say whether the aim is reached, and how, of rows chosen on the validation split."""
    found = fewest(rows, LEVEL)
    if found is not None and found.times >= TIMES and found.share >= LEVEL:
        return (
            f"**{100 * found.share:.1f} % of the mean score in {found.times:.1f} × fewer bytes: {found.label}**"
            f" ({found.bytes / found.adapters:,.0f} bytes per adapter; {found.lost} points)."
        )
    small = best_within(rows, TIMES)
    best = ""
    if small is not None:
        best = f" The best at {TIMES:g} ×: {small.label}, {100 * small.share:.1f} % ({small.lost} points)."
    return (
        f"{100 * LEVEL:g} % of the mean score takes"
        + (" more than any of these schemes." if found is None else f" {found.label}, {found.times:.1f} × fewer bytes")
        + (f", on the test split {100 * found.share:.1f} %." if found is not None else "")
        + best
    )


def fleet_section(name: str, trained: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return all that is said of a fleet."""
    rows = rows_of(trained, cells)
    if not rows:
        return []
    first = max(rows, key=lambda row: row.seeds)
    bare = [value for each in first.bare.values() for value in each]
    out = [
        f"## {name}: {first.adapters} adapters, seeds: {first.seeds}",
        "",
        f"LoRAs: {100 * _mean(first):.1f}, the base model under their heads {100 * sum(bare) / len(bare):.1f};"
        f" {first.lora_bytes / first.adapters:,.0f} bytes per adapter in float32, heads aside.",
        "",
        aim_sentence(rows),
        "",
        *aim_lines(rows),
        "",
        f"| | {' | '.join(HEAD)} |",
        f"|---|{'---|' * len(HEAD)}",
        *(line(row) for some in by_group(rows).values() for row in some),
        "",
    ]
    refused = sorted({f"{cell['family']} {cell['scheme']}: {cell['refused']}" for cell in cells if "refused" in cell})
    return [*out, *(f"- Refused: {each}" for each in refused), *([""] if refused else [])]


def head_to_head(rows: Sequence[Row]) -> list[str]:
    """Return the float32 cores against the best of SVD alone within as many bytes, size by size."""
    lines = ["| | points [95 % interval] | adapters won / tied / lost | adapters |", "|---|---|---|---|"]
    alone = [row for row in rows if row.family in ("SVD", "LoRA")]
    for row in rows:
        rivals = [each for each in alone if each.bytes <= row.bytes * 1.02 and each.seeds == row.seeds]
        if row.family in ("cores", "cores + own") and "builder" not in row.scheme and rivals:
            rival = max(rivals, key=lambda each: sum(map(sum, each.validations.values())))
            found = difference(row.tests, rival.tests)
            both = (f"{each.label} ({each.times:.1f} ×)" for each in (row, rival))
            lines.append(difference_line(" − ".join(both), found))
    return lines


def energy_section(found: Found) -> list[str]:
    """Return at which energy the functions are lost, per fleet, and what thresholds follow."""
    out = ["## At which energy is the function lost?", ""]
    levels = [f"{100 * level:.0f} % of the gain" for level in function.LEVELS]
    out += [
        "The least share of energy from which on so much is left, in bins, of everything that is stored in float32.",
        "",
        f"| fleet | points | {' | '.join(levels)} | 99 % same answers |",
        f"|---|---|{'---|' * (len(levels) + 1)}",
    ]
    needs: dict[float, list[float | None]] = {}
    details = []
    for name, (trained, cells) in found.items():
        points = function.points(trained, cells)
        bins = function.binned(points)
        if not bins:
            continue
        least = {level: function.needed(bins, level) for level in function.LEVELS}
        for level, value in least.items():
            needs.setdefault(level, []).append(value)
        same = function.unchanged(bins, 0.99)
        out.append(f"| {name} | {len(points)} | {' | '.join(map(_share, [*least.values(), same]))} |")
        details += [f"### {name}", "", *_bin_lines(bins), ""]
        if rounded := function.binned(function.points(trained, cells, rounded=True)):
            details += [f"### {name}, stored in fewer bits", "", *_bin_lines(rounded), ""]
    worst = {level: None if None in values else max(values) for level, values in needs.items()}
    return [*out, "", f"In every fleet {_needs(worst)}.", "", *_word_lines(found, worst), "", *details]


def _word_lines(found: Found, worst: Mapping[float, float | None]) -> list[str]:
    """Return what the package's words for an energy are worth, and the thresholds that these fleets would have."""
    words = (("faithful", FAITHFUL, 1.01), ("partial", PARTIAL, FAITHFUL), ("poor", 0.0, PARTIAL))
    lines = ["| fleet | the package's word | points | gain left | same answers |", f"|{'---|' * 5}"]
    for name, (trained, cells) in found.items():
        points = function.points(trained, cells)
        for word, low, high in words:
            if (each := function.between(points, low, high)) is not None:
                lines.append(
                    f"| {name} | {word}, {_share(low)}–{_share(min(high, 1.0))} | {each['points']}"
                    f" | {100 * each['gain_left']:.1f} % | {100 * each['same_answers']:.1f} % |"
                )
    return [
        *lines,
        "",
        f"Thresholds by these fleets: faithful (99 % of the gain in every bin from there on) {_share(worst.get(0.99))}"
        f" instead of {_share(FAITHFUL)}, partial (two thirds) {_share(worst.get(2 / 3))} instead of"
        f" {_share(PARTIAL)}.",
    ]


def _needs(worst: Mapping[float, float | None]) -> str:
    return ", ".join(f"{100 * level:.0f} % of the gain takes {_share(value)}" for level, value in worst.items())


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _bin_lines(bins: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| energy kept | points | same answers | worst tenth | points lost | worst tenth | gain left | change |",
        f"|{'---|' * 8}",
    ]
    for each in bins:
        gain = "–" if each["gain_left"] is None else f"{100 * each['gain_left']:.0f} %"
        lines.append(
            f"| {100 * each['from']:.0f}–{100 * each['to']:.0f} % | {each['projections']}"
            f" | {100 * each['same_answers']:.1f} % | {100 * each['same_answers_worst_tenth']:.1f} %"
            f" | {each['points_lost']:.1f} | {each['points_lost_worst_tenth']:.1f} | {gain} | {each['change']:.2f} |"
        )
    return lines


def render(found: Found) -> str:
    """Return all tables as Markdown.

    Args:
        found: name of a fleet → what `read` returns of its file.
    """
    fleets = {name: both for name, both in found.items() if not name.startswith(CHOICES)}
    out = [
        "# What compression keeps",
        "",
        "Every adapter keeps its own trained head, whose bytes count nowhere. Bytes: of all that the whole fleet"
        " needs, shared and own, over its adapters. Gain left: of what the LoRAs add to the base model under the same"
        " heads. Change: 0 is the LoRA's outputs, 1 the base model's. Sizes are chosen on the validation split.",
        "",
    ]
    for name, (trained, cells) in fleets.items():
        out += fleet_section(name, trained, cells)
        out += ["Against adapters stored one by one in as many bytes or fewer:", ""]
        out += [*head_to_head(rows_of(trained, cells)), ""]
    if fleets:
        out += energy_section(fleets)
    for name, both in found.items():
        if name.startswith(CHOICES):
            out += advice_section(name.removeprefix(CHOICES).strip("-") or "text", *both, level=LEVEL)
    return "\n".join([*out, "\\* the interval leaves out zero."]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    files = [file for file in sorted(given.results.glob("*.json")) if '"cells"' in file.read_text(encoding="utf-8")]
    if not files:
        parser.error(f"{given.results} holds no results: run `python benchmarks/quality/compression/run.py` first")
    found = {file.stem: read(file) for file in files}
    tables = render(found)
    (given.results / "tables.md").write_text(tables, encoding="utf-8")
    draw(found, given.results)
    print(json.dumps({name: len(cells) for name, (_, cells) in found.items()}))


if __name__ == "__main__":
    main()
