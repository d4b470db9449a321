"""The short tables of docs/evidence.md: means, differences to the head alone, to random directions, to LoRA r=8."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .choice import with_choice
from .paired import Difference, difference, mean_score
from .same_head_tables import HEAD, LORA, ROWS, kinds
from .sections import Rows, scores

RANDOM = "random"


def told(found: Difference) -> str:
    """Return the difference with the wider of its two intervals, and a star where both leave out zero."""
    by_t = found.by_t
    low, high = (found.low, found.high) if by_t is None else (min(found.low, by_t[0]), max(found.high, by_t[1]))
    star = r" \*" if low > 0 or high < 0 else ""
    return f"{found.mean:+.1f} [{low:+.1f}, {high:+.1f}]{star}".replace("-", "−")


def summary(rows: Rows, order: Sequence[str] = ROWS) -> list[str]:
    """Return a line per row that all tasks have.

    Args:
        rows: row → task → its results.
        order: the rows, those that are not there are left out.
    """
    rows = with_choice(rows)
    tasks = list(rows[LORA])
    names = [name for name in order if name in rows and set(rows[name]) >= set(tasks)]
    parts = {"": tasks, **kinds(tasks)}
    against = [f"against {LORA}" + (f", {words} tasks" if words else "") for words in parts]
    most = statistics.fmean(rows[LORA][task]["trained"] for task in tasks)
    beside = [
        (HEAD, tasks),
        *([(RANDOM, tasks)] if RANDOM in names else []),
        *((LORA, part) for part in parts.values()),
    ]
    words = [*(f"over {other}" for other, _ in beside if other != LORA), *against]
    lines = [f"| {len(tasks)} tasks | trained | mean | {' | '.join(words)} |", "|---" * (3 + len(words)) + "|"]
    for name in names:
        each = scores(rows, name)
        trained = statistics.fmean(rows[name][task]["trained"] for task in tasks)
        share = f" ({100 * trained / most:.1f} %)" if trained and name != LORA else ""
        cells = [f"{trained:,.0f}{share}", f"{mean_score(each, tasks):.1f}"]
        for other, some in beside:
            theirs = scores(rows, other)
            cells.append(
                "–" if name == other else told(difference({t: each[t] for t in some}, {t: theirs[t] for t in some}))
            )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines
