"""Learning curves of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from subspace_peft._io.atomic import write_aside


def draw_curves(
    results: Sequence[Mapping[str, Any]], file: str | Path, *, title: str = "", score: str = "validation score"
) -> Path:
    """Draw validation score against steps into the PNG `file`: per method the mean over seeds, and the seeds' range as
    a band.

    Args:
        results: what `compare` returned. Untrained methods, whose curve is one point, become a dashed line.
        file: written aside and renamed.
        title, score: above the figure and beside its axis.

    Raises:
        ImportError: matplotlib is missing; install subspace-peft[report].
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.6, 4))
    for row in results:
        points = _by_step(row["curves"])
        steps = sorted(points)
        means = [sum(points[step]) / len(points[step]) for step in steps]
        if not steps:
            continue
        if row["rate"] is None:
            axis.axhline(means[-1], linestyle="--", color="#999999", label=row["method"])
            continue
        (line,) = axis.plot(steps, means, marker="o", markersize=3, label=row["method"])
        low, high = [min(points[step]) for step in steps], [max(points[step]) for step in steps]
        axis.fill_between(steps, low, high, alpha=0.12, color=line.get_color(), linewidth=0)
    axis.set(title=title, xlabel="step", ylabel=score)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    # without the version in the file, the same figure is the same bytes
    write_aside(Path(file), lambda path: figure.savefig(path, format="png", dpi=130, metadata={"Software": None}))
    plt.close(figure)
    return Path(file)


def _by_step(curves: Sequence[Sequence[Sequence[Any]]]) -> dict[int, list[float]]:
    points: dict[int, list[float]] = {}
    for curve in curves:
        for step, value in curve:
            if value is not None:
                points.setdefault(step, []).append(value)
    return points
