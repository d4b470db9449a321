"""Draw a run: scores by task, growth of the basis, and bytes beside a LoRA for each task."""

from __future__ import annotations

import math
from itertools import accumulate
from pathlib import Path
from typing import Any

from .._io.atomic import write_aside
from ..errors import SubspaceError

RUN, LORA, GREY = "#1f5fa8", "#c2571a", "#8a8a8a"


def draw(status: Any, file: Path) -> Path:
    """Draw a run's state into a PNG; see `RunStatus.figure`."""
    if not status.learned:
        raise SubspaceError("No task is learned yet, so there is nothing to draw. Learn one first.")
    try:
        import matplotlib
    except ImportError:
        raise ImportError("The figure of a run needs matplotlib: pip install subspace-peft[report].") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    _scores(axes[0], status)
    _growth(axes[1], status)
    _bytes(axes[2], status)
    for axis in axes:
        axis.set_xticks(range(1, len(status.learned) + 1))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    # without the version in the file, the same figure is the same bytes
    write_aside(file, lambda path: figure.savefig(path, format="png", dpi=110, metadata={"Software": None}))
    plt.close(figure)
    return file


def _scores(axis: Any, status: Any) -> None:
    matrix, count = status.matrix, len(status.learned)
    for i in range(1, count + 1):
        values = [matrix.score(t, i) for t in range(i, count + 1)]
        axis.plot(range(i, count + 1), values, marker=".", color=GREY, alpha=0.6, linewidth=1)
    means = []
    for t in range(1, count + 1):
        known = [matrix.score(t, i) for i in range(1, t + 1)]
        known = [value for value in known if not math.isnan(value)]
        means.append(math.fsum(known) / len(known) if known else math.nan)
    axis.plot(range(1, count + 1), means, marker="o", color=RUN, label="mean of the tasks so far")
    axis.plot([], [], marker=".", color=GREY, label="each task")
    axis.set(title="score", xlabel="tasks learned")


def _growth(axis: Any, status: Any) -> None:
    series = list(status.growth.values())
    steps = range(len(series[0]))
    for side, label, colour in ((0, "output side", RUN), (1, "input side", LORA)):
        means = [sum(each[t][side] for each in series) / len(series) for t in steps]
        axis.plot(steps, means, marker="o", color=colour, label=label)
    axis.set(title="directions per module, k", xlabel="tasks learned", ylim=(0, None))


def _bytes(axis: Any, status: Any) -> None:
    made = {version.task: version.bytes for version in status.versions}
    basis, now = [], status.versions[0].bytes
    for name in status.learned:
        now = made.get(name, now)
        basis.append(now)
    tasks = accumulate(status.task_bytes.get(name, 0) for name in status.learned)
    loras = list(accumulate(status.lora_bytes.get(name, 0) for name in status.learned))
    steps = range(1, len(status.learned) + 1)
    axis.plot(
        steps, [a + b for a, b in zip(basis, tasks, strict=True)], marker="o", color=RUN, label="basis and tasks"
    )
    axis.plot(steps, loras, marker="o", color=LORA, label="a LoRA for each")
    axis.set(title="bytes", xlabel="tasks learned", ylim=(0, None))
