"""Write a report's tables as CSV."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from .._io.atomic import write_text_aside
from ..energy import mean
from .facts import LEFT_OUT, ReportFacts


def write_tables(report: ReportFacts, folder: Path) -> None:
    """Write ``modules.csv`` and ``adapters.csv``, in the order of the page.

    Args:
        report: what was measured; nothing is written where nothing was.
        folder: where the files go.
    """
    if not report.modules:
        return
    modules = [
        {
            "module": name,
            "out": m.shape[0],
            "in": m.shape[1],
            "k_out": m.size[0],
            "k_in": m.size[1],
            "kept": mean(m.kept),
            "left_out": mean(m.left_out_here),
            "null": mean(m.null_here),
            "above_out": m.above_out,
            "above_in": m.above_in,
            "k_for_share": m.k_for_share,
        }
        for name, m in report.modules.items()
    ]
    keys = ("name", "seed_group", "norm", "in_basis", "kept", LEFT_OUT, "mean_only", "extra_rank")
    adapters = [{key: entry[key] for key in keys} for entry in report.sources]
    for name, rows in (("modules.csv", modules), ("adapters.csv", adapters)):
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text_aside(folder / name, text.getvalue())
