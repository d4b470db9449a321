"""Figures as PNG files, without a display; the same figure is the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from subspace_peft._io.atomic import write_aside


def pyplot() -> Any:
    """Return `matplotlib.pyplot`, drawing into files.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError('Figures need matplotlib: pip install "subspace-peft[recipes]".') from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure: Any, file: Path, dpi: int = 130) -> None:
    """Write a figure into the PNG `file`, aside and renamed, and close it."""
    figure.tight_layout()
    # without the version in the file, the same figure is the same bytes
    metadata = {"Software": None}
    write_aside(file, lambda path: figure.savefig(path, format="png", dpi=dpi, metadata=metadata))
    pyplot().close(figure)
