"""Figures: the score kept against bytes, and against the energy kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common as shared

from . import function
from .compared import by_group, rows_of

SHOWN = (
    "LoRA in fewer bits",
    "SVD",
    "SVD in fewer bits",
    "cores",
    "cores in fewer bits",
    "cores (random)",
    "cores + own in fewer bits",
    "JD-Diag",
    "clusters",
    "vlora-dev",
    "lorashare",
    "given basis",
    "given basis in fewer bits",
)


def draw(found: Mapping[str, tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]], folder: Path) -> None:
    """Draw bytes.png, a panel per fleet, and energy.png, a line per fleet.

    Args:
        found: name of a fleet → its trained fleets and cells.
        folder: where the figures go.
    """
    fleets = {name: both for name, both in found.items() if not name.startswith("choices")}
    if not fleets:
        return
    plt = shared.pyplot()
    figure, axes = plt.subplots(1, len(fleets), figsize=(6.2 * len(fleets), 4.6), squeeze=False)
    for axis, (name, (trained, cells)) in zip(axes[0], fleets.items(), strict=True):
        rows = rows_of(trained, cells)
        for place, wanted in enumerate(SHOWN):
            some = by_group(rows).get(wanted, [])
            if some:
                points = [(row.bytes / row.adapters, 100 * row.gain_left) for row in some]
                style = {"marker": "os^v"[place % 4], "ms": 4, "lw": 1, "color": f"C{place % 10}"}
                axis.plot(*zip(*points, strict=True), label=wanted, ls="-" if place < 10 else ":", **style)
        if rows:
            size = rows[0].lora_bytes / rows[0].adapters
            axis.axvline(size / 20, color="black", lw=0.7, ls=":")
            axis.annotate("20 × fewer", (size / 20, 2), fontsize=7, rotation=90)
        axis.axhline(100, color="black", lw=0.7)
        axis.set(
            xscale="log",
            ylim=(0, 110),
            xlabel="bytes per adapter, all that is shared counted in",
            ylabel="left of what the LoRAs add, %",
            title=name,
        )
        axis.legend(fontsize=6)
        axis.grid(alpha=0.3)
    shared.save_figure(figure, folder / "bytes.png", dpi=110)
    figure, axis = plt.subplots(figsize=(6.2, 4.2))
    for name, (trained, cells) in fleets.items():
        bins = [each for each in function.binned(function.points(trained, cells)) if each["gain_left"] is not None]
        middle = [50 * (each["from"] + each["to"]) for each in bins]
        axis.plot(middle, [100 * each["gain_left"] for each in bins], marker="o", ms=4, label=f"{name}: gain left")
        same = [100 * each["same_answers"] for each in bins]
        axis.plot(middle, same, marker="s", ms=3, ls=":", label=f"{name}: same answers")
    axis.set(xlabel="energy kept, %", ylabel="%", ylim=(0, 105))
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
    shared.save_figure(figure, folder / "energy.png", dpi=110)
