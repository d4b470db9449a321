"""What continual learning is measured by: the matrix of scores, and the numbers that follow from it.

``R[t, i]`` is the score on task i after task t was learned, both counted from 1 to T; more is better. Importing this
module needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .._shown import Shown, Table
from ..errors import SubspaceError

METRICS = ("acc", "bwt", "forgetting", "fwt")
MISSING = "–"  # what a table shows where nothing was measured


@dataclass(frozen=True, repr=False)
class ScoreMatrix(Shown):
    """The scores of a run, and ACC, BWT, forgetting and FWT of them.

    A metric is NaN where one of the entries that it needs was not measured, and where it is undefined: BWT, forgetting
    and FWT of a single task.

    Attributes:
        names: the tasks in the order in which they were learned.
        rows: row t has the scores after task t, task by task: R[t, 1] … R[t, t]. An entry that was not measured is NaN
            or None; a row may be shorter, and may not be longer than T.
        forward: task → R[i−1, i]: its score with parameters of the basis alone, fitted before the task was learned.
        baseline: task → b_i: the same with random directions of the same sizes in the basis's place.

    Raises:
        SubspaceError: a task comes twice, there are more rows than tasks, or a row is longer than the tasks.
    """

    names: Sequence[str]
    rows: Sequence[Sequence[float | None]]
    forward: Mapping[str, float] = field(default_factory=dict)
    baseline: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names, rows = tuple(self.names), tuple(tuple(map(_number, row)) for row in self.rows)
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise SubspaceError(f"The task {twice!r} is in the matrix of scores twice. Name its tasks apart.")
        if len(rows) > len(names) or any(len(row) > len(names) for row in rows):
            raise SubspaceError(
                f"The matrix of scores has {len(rows)} rows of up to {max(map(len, rows))} scores for {len(names)}"
                " tasks. Give a row of scores for each task, one score for each task known by then."
            )
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "rows", rows)

    def score(self, after: int, task: int) -> float:
        """Return R[after, task], both counted from 1; NaN where it was not measured."""
        if not (1 <= after <= len(self.names) and 1 <= task <= len(self.names)):
            raise SubspaceError(f"R[{after}, {task}]: the matrix has {len(self.names)} tasks, counted from 1.")
        row = self.rows[after - 1] if after <= len(self.rows) else ()
        return row[task - 1] if task <= len(row) else math.nan

    @property
    def learned(self) -> int:
        """T: how many tasks were learned, and have a row."""
        return len(self.rows)

    def last(self) -> dict[str, float]:
        """Return the scores after the last task: task → R[T, i]."""
        return {name: self.score(self.learned, i) for i, name in self._tasks()}

    def acc(self) -> float:
        """Return ``ACC = 1/T Σ_i R[T, i]``, the mean score after the last task; NaN of no task."""
        return _mean(self.last().values())

    def bwt(self) -> float:
        """Return backward transfer, ``BWT = 1/(T−1) Σ_{i<T} (R[T, i] − R[i, i])``: what later tasks changed.

        0 where nothing was forgotten or gained (arXiv 1706.08840); NaN of fewer than two tasks.
        """
        end = self.learned
        return _mean(self.score(end, i) - self.score(i, i) for i in range(1, end))

    def forgetting(self) -> float:
        """Return ``1/(T−1) Σ_{i<T} max_{t<T} (R[t, i] − R[T, i])``: what is left of each task's best (1801.10112).

        The maximum is over the measured R[t, i] with i ≤ t < T; NaN of fewer than two tasks, and of a task that has
        none.
        """
        end = self.learned
        best = (_max(self.score(t, i) for t in range(i, end)) - self.score(end, i) for i in range(1, end))
        return _mean(best)

    def fwt(self) -> float:
        """Return forward transfer, ``FWT = 1/(T−1) Σ_{i>1} (R[i−1, i] − b_i)``.

        R[i−1, i] is measured with the core's parameters alone, fitted on the task's examples before the basis saw it,
        b_i in the same way with random directions. NaN of fewer than two tasks, and where a task has no such scores.
        """
        later = self.names[1 : self.learned]
        return _mean(self.forward.get(name, math.nan) - self.baseline.get(name, math.nan) for name in later)

    def metrics(self) -> dict[str, float]:
        """Return all four by name: ``acc``, ``bwt``, ``forgetting`` and ``fwt``."""
        return {name: getattr(self, name)() for name in METRICS}

    def to_dict(self) -> dict[str, Any]:
        """Return names, scores and metrics as JSON values; None where something is not a number."""
        rows = [[_json(self.score(t, i)) for i, _ in self._tasks()] for t in range(1, self.learned + 1)]
        return {
            "tasks": list(self.names[: self.learned]),
            "scores": rows,
            "forward": {name: _json(value) for name, value in self.forward.items()},
            "baseline": {name: _json(value) for name, value in self.baseline.items()},
            **{name: _json(value) for name, value in self.metrics().items()},
        }

    def table(self, *, markdown: bool = False) -> str:
        """Return the matrix and the metrics as text.

        Args:
            markdown: as a table of Markdown instead of columns.
        """
        head = ["after", *self.names[: self.learned]]
        body = [
            [name, *(_shown(self.score(t, i)) for i, _ in self._tasks())]
            for t, name in enumerate(self.names[: self.learned], start=1)
        ]
        said = ", ".join(f"{_word(name)} {_shown(value)}" for name, value in self.metrics().items())
        return f"{columns(head, body, markdown=markdown)}\n\n{said}"

    def _tasks(self) -> list[tuple[int, str]]:
        return list(enumerate(self.names[: self.learned], start=1))

    def _shown_facts(self) -> Iterable[tuple[str, Any]]:
        yield "tasks", self.learned
        for name, value in self.metrics().items():
            yield _word(name), None if math.isnan(value) else f"{value:.4g}"

    def _shown_table(self) -> Table:
        rows = ((name, *(_shown(self.score(t, i)) for i, _ in self._tasks())) for t, name in self._tasks())
        return ("after", *self.names[: self.learned]), rows, self.learned


def columns(head: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """Return a table as text: the first column to the left, the others to the right.

    Args:
        head: the names of its columns.
        rows: its cells.
        markdown: as a table of Markdown instead of columns.
    """
    if markdown:
        head, rows = [_cell(each) for each in head], [[_cell(each) for each in row] for row in rows]
        ruled = ["|---|" + "---:|" * (len(head) - 1)]
        return "\n".join([f"| {' | '.join(row)} |" for row in [head]] + ruled + [f"| {' | '.join(r)} |" for r in rows])
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|")


def _word(name: str) -> str:
    return name if name == "forgetting" else name.upper()


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found) if found else math.nan


def _max(values: Iterable[float]) -> float:
    found = [value for value in values if not math.isnan(value)]
    return max(found, default=math.nan)


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _shown(value: float) -> str:
    return MISSING if math.isnan(value) else f"{value:.3f}"
