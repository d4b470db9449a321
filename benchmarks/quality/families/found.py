"""What the families' results hold: scores of a row by member and seed, and paired differences between rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..paired import Difference, difference
from .cells import Cell, K, read_runs

EXAMPLES = (50, 100, 300, 1000)


@dataclass(frozen=True)
class Which:
    """A row at a size, in a basis of so many sources, with so many examples; as in `Cell`."""

    row: str
    examples: int
    k: int = 0
    sources: int = 0
    mixed: bool = False


@dataclass(frozen=True, eq=False)
class Found:
    """The results of one family.

    Attributes:
        name: of the family.
        facts: what is known of it beside its runs.
        runs: cell → run, of held-out members alone.
    """

    name: str
    facts: Mapping[str, Any]
    runs: Mapping[Cell, Mapping[str, Any]]

    def scores(self, which: Which) -> dict[tuple[str, int], float | None]:
        """Return (member, seed) → test score."""
        return {
            (cell.member, cell.seed): run["test"]
            for cell, run in self.runs.items()
            if Which(cell.row, cell.examples, cell.k, cell.sources, cell.mixed) == which
        }

    def points(self, which: Which) -> float | None:
        """Return the mean score in points over members and the seeds that all of them have; None without any."""
        found = per_seed(self.scores(which))
        return (
            100 * sum(sum(s or 0.0 for s in each) / len(each) for each in found.values()) / len(found)
            if found
            else None
        )

    def minus(self, ours: Which, theirs: Which) -> Difference | None:
        """Return `ours` − `theirs`, paired by member and seed; None where they have no seed in common."""
        return pooled([(self, ours, theirs)])

    def counts(self, mixed: bool = False) -> list[int]:
        """Return the numbers of sources of the curve."""
        return sorted({c.sources for c in self.runs if c.row == "core" and c.mixed == mixed})

    def core(self, examples: int, count: int, k: int = K, mixed: bool = False) -> Which:
        """Return the core of a basis of `count` sources, at `k` or the size that so few reach."""
        return Which("core", examples, min(k, 8 * count), count, mixed)


def read(folder: Path) -> dict[str, Found]:
    """Return family → its results, of those that have some."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        body = json.loads(file.read_text(encoding="utf-8"))
        if "runs" in body:
            held = set(body["facts"]["held_out"])
            runs = {cell: run for cell, run in read_runs(body) if cell.member in held}
            if runs:
                found[file.stem] = Found(file.stem, body["facts"], runs)
    return found


def per_seed(scores: Mapping[tuple[str, int], float | None]) -> dict[str, list[float | None]]:
    """Return member → score per seed, of the seeds that all members have, in their order."""
    members = list(dict.fromkeys(member for member, _ in scores))
    seeds = sorted({seed for _, seed in scores})
    whole = [seed for seed in seeds if all((member, seed) in scores for member in members)]
    return {member: [scores[member, seed] for seed in whole] for member in members} if whole else {}


def pooled(parts: Sequence[tuple[Found, Which, Which]]) -> Difference | None:
    """Return the paired difference over the members of several families; None where they have no seed in common."""
    left: dict[tuple[str, int], float | None] = {}
    right: dict[tuple[str, int], float | None] = {}
    for found, ours, theirs in parts:
        a, b = found.scores(ours), found.scores(theirs)
        for member, seed in a:
            if (member, seed) in b:
                left[f"{found.name}/{member}", seed] = a[member, seed]
                right[f"{found.name}/{member}", seed] = b[member, seed]
    ours_, theirs_ = per_seed(left), per_seed(right)
    return difference(ours_, theirs_) if ours_ else None
