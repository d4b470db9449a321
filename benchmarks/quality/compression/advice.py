"""What a fleet's owner can do beforehand: the table of choices, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..paired import difference
from .choices import CHOICES
from .compared import Row, fewest, mean_of, rows_of

OWN = CHOICES[0].name  # what the others are held against


def advice_section(
    fleet: str, trained: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], *, level: float
) -> list[str]:
    """Return the table of choices.

    Args:
        fleet: whose adapters they are.
        trained: see `compared.rows_of`.
        cells: of all choices.
        level: of the mean score of LoRAs from own starts that has to be kept.
    """
    rows = {choice.name: rows_of(trained, cells, _of(choice.name)) for choice in CHOICES}
    rows = {name: found for name, found in rows.items() if found}
    if OWN not in rows:
        return []
    own = rows[OWN][0]
    out = [
        f"## What a fleet's owner can do beforehand: {fleet}",
        "",
        f"{own.adapters} adapters, seeds: {own.seeds}, each choice at its own rate, chosen by validation on the text"
        " tasks. Fewest bytes: what keeps"
        f" {100 * level:g} % of the validation score of LoRAs from own starts, and its test score.",
        "",
        "| every task trained from | score as trained | against own starts [95 %] | fewest bytes per adapter"
        " | times fewer | test score | against own starts' LoRAs [95 %] | stored as |",
        f"|{'---|' * 8}",
    ]
    best: list[tuple[Row, str]] = []
    for name, found in rows.items():
        alone = dict(found[0].lora)
        if found[0].seeds != own.seeds:
            continue
        first = [name, f"{100 * mean_of(alone):.1f}", str(difference(alone, own.lora)) if name != OWN else "–"]
        small = fewest(found, level, mean_of(own.lora_validations))
        if small is None:
            tried = max(found, key=lambda row: mean_of(row.validations))
            score, away = f"{100 * mean_of(tried.tests):.1f}", str(difference(tried.tests, own.lora))
            first += ["–", "–", score, away, f"nothing tried; best {tried.label}"]
        else:
            best.append((small, name))
            first += [
                f"{small.bytes / small.adapters:,.0f}",
                f"{own.lora_bytes / small.bytes:.1f}",
                f"{100 * mean_of(small.tests):.1f}",
                str(difference(small.tests, own.lora)),
                small.label,
            ]
        out.append(f"| {' | '.join(first)} |")
    if best:
        small, name = min(best, key=lambda pair: pair[0].bytes)
        out += [
            "",
            f"Fewest bytes at {100 * level:g} %: **{name}, stored as {small.label}:"
            f" {own.lora_bytes / small.bytes:.1f} × fewer bytes,"
            f" {difference(small.tests, own.lora)} points against LoRAs from own starts.**",
        ]
    return [*out, "", *_curves(rows, own), ""]


def _of(name: str) -> Any:
    return lambda variant: variant.startswith(f"{name}, seed")


def _curves(rows: Mapping[str, Sequence[Row]], own: Row) -> list[str]:
    """Return every row of every choice: score against bytes."""
    lines = [
        "| every task trained from | stored as | bytes per adapter | times fewer | score | energy kept |",
        f"|{'---|' * 6}",
    ]
    for name, found in rows.items():
        for row in sorted(found, key=lambda row: row.bytes):
            lines.append(
                f"| {name} | {row.label} | {row.bytes / row.adapters:,.0f} | {own.lora_bytes / row.bytes:.1f}"
                f" | {100 * mean_of(row.tests):.1f} | {100 * row.kept:.1f} % |"
            )
    return lines
