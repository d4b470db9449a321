"""What comes of choosing, by validation, between the core, the core with own directions, and LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .sections import Rows

CHOICES = ("fleet", "fleet + 2 own", "LoRA r=8")
CHOICE = "chosen by validation"


def with_choice(rows: Rows, choices: Sequence[str] = CHOICES) -> Rows:
    """Return `rows` with the row `CHOICE`, which trains nothing more.

    For every task and seed it has the test score of that of the `choices` whose run has the best validation score, of
    equals the one with the fewest parameters; a run that diverged is never chosen. Its entries have ``picks``, and as
    ``trained`` the mean over seeds. Without all choices `rows` are returned as they are.
    """
    if any(name not in rows for name in choices):
        return rows
    made = {}
    for task in rows[choices[0]]:
        if all(task in rows[name] for name in choices):
            listed = sorted((rows[name][task] for name in choices), key=lambda row: row["trained"])
            picks = []
            for seed in range(len(listed[0]["tests"])):
                values = [row["validations"][seed] for row in listed]
                picks.append(max(range(len(listed)), key=lambda i: -1.0 if values[i] is None else values[i]))
            made[task] = {
                "method": CHOICE,
                "rate": None,
                "at_edge": False,
                "sweep": [],
                "picks": [listed[i]["method"] for i in picks],
                "trained": round(sum(listed[i]["trained"] for i in picks) / len(picks)),
                **{key: [listed[i][key][seed] for seed, i in enumerate(picks)] for key in ("tests", "validations")},
            }
    return {**rows, CHOICE: made}


def choice_lines(rows: Rows, choices: Sequence[str] = CHOICES) -> list[str]:
    """Return how often each was chosen, the runs that choosing took and the parameters that are stored, or nothing.

    Args:
        rows: those of `with_choice`.
        choices: as given there.
    """
    if CHOICE not in rows:
        return []
    made = rows[CHOICE]
    picks = [pick for row in made.values() for pick in row["picks"]]
    taken = {name: sum(runs_of(rows[name][task]) for task in made) / len(made) for name in choices}
    sizes = {name: next(iter(rows[name].values()))["trained"] for name in choices}
    lines = ["| | chosen | runs per task | trained parameters |", "|---|---|---|---|"]
    for name in choices:
        share = f"{picks.count(name)} of {len(picks)}"
        lines.append(f"| {name} | {share} | {taken[name]:.1f} | {sizes[name]:,} |")
    mean = sum(row["trained"] for row in made.values()) / len(made)
    return [*lines, f"| {CHOICE} | | {sum(taken.values()):.1f} | {mean:,.0f} on average |"]


def runs_of(row: Mapping[str, Any]) -> int:
    """Return how many runs a row took on a task: those of its sweep, and the report seeds that did not sweep."""
    if len(row["sweep"]) == 1:
        return len(row["tests"])
    swept = len(row["tried"][0][1]) if row.get("tried") else 0
    return len(row["sweep"]) * max(1, swept) + len(row["tests"]) - swept
