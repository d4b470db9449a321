"""Directions of a task's own beside the fleet's basis (`SubspaceConfig(extra_rank=φ)`): the rows, and their tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from common import Method

from . import tasks
from .bench import Bench
from .experiment import usual_rate
from .rows import inside, lora
from .sections import DIFFERENCES, Rows, differences, score_table

FLEET = ("fleet", "fleet + 1 own", "fleet + 2 own", "fleet + 4 own")
RANDOM = ("random + 1 own", "random + 2 own")
LORAS = ("LoRA r=1", "LoRA r=2", "LoRA r=4", "LoRA r=8")
# of the main table, of whose runs some were done again, with the same scores
BESIDE = ("head only", "random", "LoRA r=1", "LoRA r=8", "VeRA r=384")


def own_rows(bench: Bench, name: str) -> list[Method]:
    """Return the core alone and with 1, 2 and 4 own directions, the control with 1 and 2, and LoRA of rank 2 and 4."""
    fleet, random = bench.basis(name), bench.control("random", name)
    return [
        inside("fleet", fleet),
        *(inside(f"fleet + {count} own", fleet, extra_rank=count) for count in (1, 2, 4)),
        *(inside(f"random + {count} own", random, extra_rank=count) for count in (1, 2)),
        *(lora(r) for r in (2, 4)),
    ]


def own_usual_rows(bench: Bench, name: str) -> list[Method]:
    """Return the same rows without a sweep: own directions at the rate of the core alone, LoRAs at that of r=1."""
    assert bench.results is not None
    rates = {kind: usual_rate(bench.results, kind, name) for kind in ("fleet", "random", "LoRA r=1")}
    kind_of: Callable[[str], str] = lambda row: "LoRA r=1" if row.startswith("LoRA") else row.split()[0]  # noqa: E731
    return [replace(row, rates=(rates[kind_of(row.name)],)) for row in own_rows(bench, name)]


def own_section(title: str, rows: Rows, beside: Rows) -> list[str]:
    """Return scores and differences.

    Args:
        title: of the section.
        rows: of one of the two experiments.
        beside: those of the main table at rates chosen alike, of which `BESIDE` are shown.
    """
    shown = {**{name: beside[name] for name in BESIDE if name in beside}, **rows}
    order = ("head only", *FLEET, "random", *RANDOM, *LORAS, "VeRA r=384")
    pairs = [(a, b) for a in FLEET[1:] for b in ("fleet", "LoRA r=8", "VeRA r=384", f"LoRA r={a.split()[2]}")]
    pairs += [("fleet", b) for b in ("LoRA r=8", "LoRA r=1")]
    for count in (1, 2):
        control = f"random + {count} own"
        pairs += [(control, f"LoRA r={count}"), (f"fleet + {count} own", control)]
    lines = [*DIFFERENCES, *_lines(shown, pairs)]
    every = {task for each in rows.values() for task in each}
    for kind, chosen in (("opinion", tasks.SENTIMENT), ("other", tasks.TOPIC)):
        lines += _lines(shown, pairs, kind, [task for task in chosen if task in every])
    return [f"### {title}", "", *score_table(shown, order), "", *lines, ""]


def _lines(
    rows: Mapping[str, Mapping[str, dict]], pairs: list[tuple[str, str]], kind: str = "", only: list[str] | None = None
) -> list[str]:
    words = f"{kind} tasks: " if kind else ""
    every: Rows = {name: dict(each) for name, each in rows.items()}
    return differences(((f"{words}{a} − {b}", every, a, every, b) for a, b in pairs), only)
