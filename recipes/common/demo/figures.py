"""The demo's two figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from subspace_peft.basis import SubspaceBasis


def draw_spectrum(basis: SubspaceBasis, null: SubspaceBasis, file: Path) -> None:
    """Share of the fleet's energy in the leading n directions, output and input side, beside a strength-matched
    null."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, side, title in zip(
        axes, ("spectrum_out", "spectrum_in"), ("output side (U)", "input side (V)"), strict=True
    ):
        for which, label, colour in (
            (basis, "this fleet", "#1f5fa8"),
            (null, "null: same strengths, random directions", "#999999"),
        ):
            curve = mean_cumulative(which, side)
            axis.plot(np.arange(1, len(curve) + 1), curve, label=label, color=colour)
        axis.set(title=title, xlabel="directions", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of energy")
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle("How much of the fleet few directions hold (mean over modules)", fontsize=10)
    _save(plt, figure, file)


def mean_cumulative(basis: SubspaceBasis, side: str) -> np.ndarray:
    """Cumulative spectrum, mean over modules, up to the shortest module's length."""
    curves = [getattr(basis[name], side).double().cumsum(0).numpy() for name in basis]
    shortest = min(map(len, curves))
    return np.mean([curve[:shortest] for curve in curves], axis=0)


def draw_curves(tasks: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Validation accuracy against steps, one panel per held-out task, one line per row of the table."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.6 * len(tasks), 3.6), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for row in task["rows"]:
            steps, scores = zip(*row["curve"], strict=True)
            axis.plot(steps, scores, marker="o", markersize=3, label=row["row"])
        axis.set(title=task["task"], xlabel="step")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("validation accuracy")
    axes[0][-1].legend(frameon=False, fontsize=8)
    _save(plt, figure, file)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(plt: Any, figure: Any, file: Path) -> None:
    figure.tight_layout()
    # without the version in the file, the same figures are the same bytes
    figure.savefig(file, dpi=130, metadata={"Software": None})
    plt.close(figure)
