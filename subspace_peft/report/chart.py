"""The geometry of a report's line charts, which the page draws as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..energy import percent

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 40
APART = 30  # units that labels under the chart are apart at least
LOWEST = 1e-6  # of a logarithmic axis


@dataclass(frozen=True)
class Line:
    """One curve: its words, its class in the stylesheet, and its points."""

    words: str
    style: str
    values: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """A chart, in the units of its SVG.

    Attributes:
        title: what is drawn.
        x_label: of the axis below.
        y_label: of the axis at the left.
        lines: words, class, and the ``points`` of a polyline.
        x_ticks: place and label.
        y_ticks: place and label.
    """

    title: str
    x_label: str
    y_label: str
    lines: list[dict[str, str]] = field(default_factory=list)
    x_ticks: list[tuple[float, str]] = field(default_factory=list)
    y_ticks: list[tuple[float, str]] = field(default_factory=list)
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def chart(
    title: str, x_label: str, y_label: str, xs: Sequence[int], lines: Sequence[Line], *, log_x: bool, log_y: bool
) -> Chart:
    """Lay out curves over whole numbers; those without any value are left out.

    Args:
        title: what is drawn.
        x_label: of the axis below.
        y_label: of the axis at the left.
        xs: ascending, from 1 on.
        lines: with a value per x; NaN ends a curve.
        log_x: whether the axis below is logarithmic.
        log_y: whether the one at the left is; else it goes from 0 to 1.
    """
    shown = [(line, [v for v in line.values if not math.isnan(v)]) for line in lines]
    shown = [(line, values) for line, values in shown if values]
    high = max((max(values) for _, values in shown), default=1.0) if log_y else 1.0
    positive = [v for _, values in shown for v in values if v > LOWEST]
    low = min(positive, default=LOWEST) if log_y else 0.0
    # a whole decade above and below
    bounds = (10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(max(high, low)))) if log_y else (0, 1)

    def x(value: float) -> float:
        part = math.log(value) / math.log(xs[-1]) if log_x else (value - xs[0]) / (xs[-1] - xs[0])
        return LEFT + part * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        if log_y:
            value = max(value, bounds[0])
            part = math.log(value / bounds[0]) / math.log(max(bounds[1] / bounds[0], 10.0))
        else:
            part = value
        return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)

    if len(xs) < 2:
        return Chart(title, x_label, y_label)
    drawn = [
        {
            "words": line.words,
            "style": line.style,
            "points": " ".join(f"{x(n):.1f},{y(v):.1f}" for n, v in zip(xs, values, strict=False)),
        }
        for line, values in shown
    ]
    if log_y:
        decades = range(round(math.log10(bounds[0])), round(math.log10(bounds[1])) + 1)
        y_ticks = [(y(10.0**power), percent(10.0**power) if power > -4 else "") for power in decades]
    else:
        y_ticks = [(y(step / 5), f"{20 * step} %") for step in range(6)]
    return Chart(title, x_label, y_label, drawn, _apart([(x(n), str(n)) for n in _marks(xs, log_x)]), y_ticks)


def _marks(xs: Sequence[int], log_x: bool) -> list[int]:
    """Return the numbers under the chart: the first, the last, and powers of two or even steps between."""
    if log_x:
        between = [2**power for power in range(1, 12) if xs[0] < 2**power < xs[-1]]
    else:
        step = max(1, round((xs[-1] - xs[0]) / 8))
        between = list(range(xs[0] + step, xs[-1], step))
    # the ends first: where labels are too near, those between give way
    return [xs[0], xs[-1], *between]


def _apart(ticks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Return the ticks whose labels do not run into one kept before."""
    kept: list[tuple[float, str]] = []
    for place, label in ticks:
        if all(abs(place - other) >= APART for other, _ in kept):
            kept.append((place, label))
    return sorted(kept)
