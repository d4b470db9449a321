"""Rows of the tables: a scheme on one fleet, over its seeds, held against the LoRAs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ..paired import Difference, Scores, difference

FLOAT = "float32"
WORDS = {"JD-Full, random start": "JD-Full"}
OWN_WORDS = ("cores + own", "cores + own to energy")


@dataclass(frozen=True, eq=False)
class Row:
    """A scheme on one fleet.

    Attributes:
        family, scheme: as in `Scheme`.
        bytes: of the whole fleet, the mean over seeds.
        lora_bytes: of its LoRAs in float32.
        tests, validations: adapter → scores per seed.
        lora, lora_validations, bare: those of the LoRAs, and of the base model under their heads.
        same, change, kept: means over adapters and seeds, see `members.agreement` and `members.kept`.
        loss, lora_loss: mean test losses.
        facts: of the first seed.
    """

    family: str
    scheme: Mapping[str, Any]
    bytes: float
    lora_bytes: float
    tests: Scores
    validations: Scores
    lora: Scores
    lora_validations: Scores
    bare: Scores
    same: float
    change: float
    kept: float
    loss: float
    lora_loss: float
    facts: Mapping[str, Any]

    @property
    def adapters(self) -> int:
        return len(self.tests)

    @property
    def seeds(self) -> int:
        return len(next(iter(self.tests.values())))

    @property
    def times(self) -> float:
        """How many times fewer bytes than the LoRAs in float32."""
        return self.lora_bytes / self.bytes

    @property
    def share(self) -> float:
        """The mean score as a share of the LoRAs' mean score."""
        return mean_of(self.tests) / mean_of(self.lora)

    @property
    def validation_share(self) -> float:
        """The same on the validation split."""
        return mean_of(self.validations) / mean_of(self.lora_validations)

    @property
    def gain_left(self) -> float:
        """The share of what the LoRAs add to the base model under their heads; NaN where they add nothing."""
        bare, gained = mean_of(self.bare), mean_of(self.lora) - mean_of(self.bare)
        return (mean_of(self.tests) - bare) / gained if gained > 0 else float("nan")

    @property
    def lost(self) -> Difference:
        """Points against the LoRAs, with an interval over adapters and seeds."""
        return difference(self.tests, self.lora)

    @property
    def label(self) -> str:
        return label(self.family, self.scheme)

    @property
    def group(self) -> str:
        return group(self.family, self.scheme)


def mean_of(scores: Scores) -> float:
    """Return the mean over adapters and seeds; what is not finite counts as 0."""
    return fmean(fmean(value or 0.0 for value in each) for each in scores.values())


def label(family: str, scheme: Mapping[str, Any]) -> str:
    """Return a row's name."""
    parts = [WORDS.get(family, "cores + own" if family in OWN_WORDS else family)]
    for key, words in (("rank", "r="), ("k", "k="), ("k_in", "k_in="), ("budget", "budget ")):
        if key in scheme:
            parts.append(f"{words}{scheme[key]:,}")
    if "own" in scheme:
        parts.append(f"own {scheme['own']}")
    if "energy" in scheme:
        parts.append(f"to {100 * scheme['energy']:.0f} %")
    if "clusters" in scheme:
        parts.append(f"in {scheme['clusters']}")
    if "numbers" in scheme:
        parts.append(f"{scheme['numbers']:,} numbers")
    if "builder" in scheme:
        parts.append(f"({scheme['builder']})")
    kinds = list(dict.fromkeys(scheme[key] for key in ("basis", "core", "kind") if key in scheme))
    return " ".join(parts) + (f", {'/'.join(kinds)}" if kinds else "")


def group(family: str, scheme: Mapping[str, Any]) -> str:
    """Return what a row is one size of: schemes between which a user has to choose."""
    found = "cores + own" if family in OWN_WORDS else family
    if "builder" in scheme:
        found += f" ({scheme['builder']})"
    kinds = [scheme[key] for key in ("basis", "core", "kind") if key in scheme]
    return found + (" in fewer bits" if any(kind != FLOAT for kind in kinds) else "")


def read(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the trained fleets and the cells of a file of results."""
    body = json.loads(file.read_text(encoding="utf-8"))
    return body["trained"], body["cells"]


def rows_of(
    trained: Mapping[str, Any], cells: Iterable[Mapping[str, Any]], variant: Callable[[str], bool] = bool
) -> list[Row]:
    """Return a row per scheme, in the order of the cells; refused ones have none.

    Args:
        trained: digest of the adapters → what they do by themselves.
        cells: of one fleet.
        variant: which of its variants count.
    """
    schemes: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        if variant(cell["variant"]) and "refused" not in cell:
            schemes.setdefault(json.dumps([cell["family"], cell["scheme"]], sort_keys=True), []).append(cell)
    return [_row(trained, sorted(found, key=lambda cell: cell["variant"])) for found in schemes.values()]


def _row(trained: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> Row:
    names = list(cells[0]["members"])
    alone = [trained[cell["adapters"]] for cell in cells]

    def column(place: int) -> dict[str, list[float]]:
        return {name: [cell["members"][name][place] for cell in cells] for name in names}

    def of(which: str, place: int) -> dict[str, list[float]]:
        return {name: [each["members"][name][which][place] for each in alone] for name in names}

    listed = ("key", "variant", "adapters", "family", "scheme", "bytes", "members")
    return Row(
        cells[0]["family"],
        cells[0]["scheme"],
        fmean(cell["bytes"] for cell in cells),
        fmean(each["bytes"] for each in alone),
        column(1),
        column(0),
        of("lora", 1),
        of("lora", 0),
        of("bare", 1),
        *(mean_of(column(place)) for place in (3, 4, 5, 2)),
        mean_of(of("lora", 2)),
        {key: value for key, value in cells[0].items() if key not in listed},
    )


def fewest(rows: Iterable[Row], level: float, against: float | None = None) -> Row | None:
    """Return the row of the fewest bytes that keeps the share `level` of the score on the validation split.

    Args:
        rows: to choose from.
        level: of the mean validation score.
        against: the mean validation score that this is a share of; the rows' own LoRAs' without it.
    """
    enough = [
        row
        for row in rows
        if mean_of(row.validations) >= level * (mean_of(row.lora_validations) if against is None else against)
    ]
    return min(enough, key=lambda row: row.bytes) if enough else None


def best_within(rows: Iterable[Row], times: float) -> Row | None:
    """Return the row of the best validation score among those of at least so many `times` fewer bytes."""
    small = [row for row in rows if row.times >= times]
    return max(small, key=lambda row: mean_of(row.validations)) if small else None


def by_group(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return group → its rows, from few bytes to many."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.bytes):
        found.setdefault(row.group, []).append(row)
    return found
