"""Learning curves of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .figures import pyplot, save_figure

Rows = Sequence[Mapping[str, Any]]


def draw_curves(results: Rows, file: str | Path, *, title: str = "", score: str = "validation score") -> Path:
    """Draw the validation score against steps into the PNG `file`: see `draw_panels`, of which this is one panel.

    Args:
        results: the rows that `compare` returned.
        file: written aside and renamed.
        title, score: above the figure and beside its axis.
    """
    return draw_panels({title: results}, file, score=score, width=7.6)


def draw_panels(
    panels: Mapping[str, Rows], file: str | Path, *, score: str = "validation score", width: float = 4.6
) -> Path:
    """Draw the validation score against steps, a panel per comparison, into the PNG `file`.

    A line is the mean of a method's seeds, the band around it their range; an untrained method is a dashed line.

    Args:
        panels: title of a panel → the rows that `compare` returned.
        file: written aside and renamed.
        score: beside the axis of the first panel.
        width: of a panel, in inches.

    Raises:
        ImportError: matplotlib is missing.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(width * len(panels), 4), squeeze=False)
    for axis, (title, results) in zip(axes[0], panels.items(), strict=True):
        for row in results:
            _draw_row(axis, row)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(score)
    if axes[0][-1].get_legend_handles_labels()[0]:
        axes[0][-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, Path(file))
    return Path(file)


def _draw_row(axis: Any, row: Mapping[str, Any]) -> None:
    points = _by_step(row["curves"])
    steps = sorted(points)
    if not steps:
        return
    means = [sum(points[step]) / len(points[step]) for step in steps]
    if row["rate"] is None:
        axis.axhline(means[-1], linestyle="--", color="#999999", label=row["method"])
        return
    (line,) = axis.plot(steps, means, marker="o", markersize=3, label=row["method"])
    low, high = [min(points[step]) for step in steps], [max(points[step]) for step in steps]
    axis.fill_between(steps, low, high, alpha=0.12, color=line.get_color(), linewidth=0)


def _by_step(curves: Sequence[Sequence[Sequence[Any]]]) -> dict[int, list[float]]:
    points: dict[int, list[float]] = {}
    for curve in curves:
        for step, value in curve:
            if value is not None:
                points.setdefault(step, []).append(value)
    return points
