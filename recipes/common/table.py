"""The comparison as a Markdown table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from subspace_peft._io.atomic import write_all_aside

from .run_cache import plain

HEADER = (
    "| method | test score | seeds | trained (adapter) | trained (head) | adapter bytes, without head | train s |"
    " learning rate |\n|---|---|---|---|---|---|---|---|"
)


def markdown_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the rows that `compare` returned.

    Notes below it tell of sweeps that ended at an edge.
    """
    lines = [HEADER]
    for row in results:
        rate = "–" if row["rate"] is None else f"{row['rate']:g}{' *' if row['at_edge'] else ''}"
        lines.append(
            f"| {row['method']} | {_score(row)} | {len(row['seeds'])} | {row['trained_adapter']:,} |"
            f" {row['trained_head']:,} | {row['bytes']:,} | {row['seconds']:.1f} | {rate} |"
        )
    if any(row["at_edge"] for row in results):
        lines += ["", "\\* the smallest or largest rate that was tried: a further one may be better."]
    return "\n".join(lines) + "\n"


def _score(row: Mapping[str, Any]) -> str:
    if row["diverged"]:
        others = ", ".join(f"{test:.3f}" for test in row["tests"] if test is not None)
        return f"diverged in {row['diverged']} of {len(row['seeds'])}" + (f" (others: {others})" if others else "")
    spread = "" if row["test_sd"] is None else f" ± {row['test_sd']:.3f}"
    return f"{row['test']:.3f}{spread}"


def write_results(
    results: Sequence[Mapping[str, Any]],
    folder: str | Path,
    *,
    title: str = "",
    settings: Mapping[str, Any] | None = None,
) -> str:
    """Write `results.json` and `table.md` into `folder`; both or, where the disk refuses, neither.

    Args:
        results: what `compare` returned.
        folder: made where it is not there.
        title: a line above the table: task, base model, budget.
        settings: kept in the JSON beside the results.

    Returns:
        The Markdown text.
    """
    text = (f"{title}\n\n" if title else "") + markdown_table(results)
    body = {"title": title, "settings": plain(settings or {}), "results": plain(list(results))}
    write_texts(folder, {"results.json": json.dumps(body, indent=1, allow_nan=False) + "\n", "table.md": text})
    return text


def write_texts(folder: str | Path, texts: Mapping[str, str]) -> None:
    """Write text files into `folder`, all of them or, where the disk refuses one, none."""

    def writer(text: str) -> Callable[[Path], object]:
        return lambda path: path.write_text(text, encoding="utf-8")

    write_all_aside({Path(folder) / name: writer(text) for name, text in texts.items()})
