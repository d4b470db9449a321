"""Draw a report's figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._io.atomic import write_aside
from ..energy import mean
from .facts import LEFT_OUT, ReportFacts

FLEET, OTHERS, NULL, RANDOM = "#1f5fa8", "#c2571a", "#8a8a8a", "#bbbbbb"
HAIR = 0.006  # a bar of less would not be seen
SHOWN = 64  # adapters in the figure of adapters


def draw(report: ReportFacts, folder: Path) -> dict[str, Path]:
    """Draw what was measured into PNGs, written aside and renamed.

    Args:
        report: what was measured.
        folder: where the files go.

    Returns:
        Title → file; empty where nothing was measured.

    Raises:
        ImportError: matplotlib is missing; install subspace-peft[report].
    """
    if not report.modules:
        return {}
    try:
        import matplotlib
    except ImportError:
        raise ImportError("A report's figures need matplotlib: pip install subspace-peft[report].") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawings = {
        "Spectra beside noise of the same strength": ("spectrum.png", _spectra),
        "Energy kept, by number of directions": ("energy.png", _energies),
        "Module by module": ("modules.png", _modules),
        "Adapter by adapter": ("adapters.png", _adapters),
    }
    files = {}
    for title, (name, paint) in drawings.items():
        figure = paint(plt, report)
        figure.tight_layout()
        # without the version in the file, the same figure is the same bytes
        write_aside(
            folder / name, lambda path, f=figure: f.savefig(path, format="png", dpi=110, metadata={"Software": None})
        )
        plt.close(figure)
        files[title] = folder / name
    return files


def _spectra(plt: Any, report: ReportFacts) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, side, title in zip(axes, ("out", "in"), ("output side", "input side"), strict=True):
        for prefix, label, colour in (("spectrum", "this fleet", FLEET), ("null", "noise of the same strength", NULL)):
            curve = _mean_curve([getattr(module, f"{prefix}_{side}") for module in report.modules.values()])
            axis.plot(range(1, len(curve) + 1), curve, label=label, color=colour)
        axis.set(title=title, xlabel="direction", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of the fleet's energy")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def _energies(plt: Any, report: ReportFacts) -> Any:
    figure, axis = plt.subplots(figsize=(7.5, 3.6))
    modules = list(report.modules.values())
    shared = [k for k in modules[0].ks if all(k in module.ks for module in modules)]
    lines = (
        ("seen", "of adapters it was built from", FLEET, "-"),
        ("left_out", "of adapters left out", OTHERS, "-"),
        ("null", "of noise it was built from", NULL, "--"),
        ("random", "random directions, of anything", RANDOM, "--"),
    )
    for key, label, colour, style in lines:
        values = [sum(getattr(module, key)[module.ks.index(k)] for module in modules) / len(modules) for k in shared]
        axis.plot(shared, values, style, marker="o", markersize=3, label=label, color=colour)
    axis.set(xlabel="directions per side, k", ylabel="share of energy kept", xscale="log", ylim=(-0.02, 1.02))
    # the last size comes where it comes: a label next to it would run into it
    marked = [k for k in shared if k == shared[-1] or k * 1.4 < shared[-1]]
    axis.set_xticks(marked, [str(k) for k in marked])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    return figure


def _modules(plt: Any, report: ReportFacts) -> Any:
    names = list(report.modules)
    rows = {
        "kept by the basis": [mean(module.kept) for module in report.modules.values()],
        "kept of adapters left out": [mean(module.left_out_here) for module in report.modules.values()],
    }
    return _bars(plt, names, rows)


def _adapters(plt: Any, report: ReportFacts) -> Any:
    entries = report.sources[:SHOWN]  # in the order of the page's table
    rows = {
        "kept by the basis": [entry["kept"] for entry in entries],
        "kept by a basis without it": [entry[LEFT_OUT] for entry in entries],
    }
    return _bars(plt, [entry["name"] for entry in entries], rows)


def _bars(plt: Any, names: Sequence[str], rows: dict[str, list[float | None]]) -> Any:
    figure, axis = plt.subplots(figsize=(8.5, 0.9 + 0.28 * len(names)))
    for number, ((label, values), colour) in enumerate(zip(rows.items(), (FLEET, OTHERS), strict=True)):
        places = [i + (number - 0.5) * 0.38 for i in range(len(names))]
        axis.barh(
            places, [max(value, HAIR) if value else 0.0 for value in values], height=0.36, label=label, color=colour
        )
    axis.set_yticks(range(len(names)), [name if len(name) <= 52 else f"…{name[-51:]}" for name in names], fontsize=7)
    axis.invert_yaxis()
    axis.set(xlim=(0, 1.02), xlabel="share of energy")
    axis.grid(alpha=0.3, axis="x")
    axis.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncol=2)
    return figure


def _mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    shortest = min(map(len, curves))
    return [sum(values) / len(values) for values in zip(*(curve[:shortest] for curve in curves), strict=True)]
