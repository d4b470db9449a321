"""One training run of a family's benchmark, and where runs are kept: in the cache, and in the committed results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from subspace_peft._io.atomic import write_text_aside
from subspace_peft.errors import SubspaceError

K = 16  # size of the bases, where nothing else is said
RANK = 8  # of the sources


@dataclass(frozen=True)
class Cell:
    """A run: of which row, on which member, with how many examples.

    Attributes:
        member: the held-out task, or one on which rates are chosen.
        row: ``core``, ``mean only``, ``random``, ``base weights``, ``LoRA r=8``, ``LoRA r=1``, ``VeRA`` or
            ``head only``.
        examples: training examples.
        seed: draws examples, their order, head, random directions, and which sources come first.
        rate: learning rate.
        k: size of the basis, 0 without one.
        sources: so many adapters made the basis, 0 without one.
        mixed: whether these are of other families.
    """

    member: str
    row: str
    examples: int
    seed: int
    rate: float
    k: int = 0
    sources: int = 0
    mixed: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(getattr(self, each.name) for each in fields(self))


class Store:
    """The results of one family: a JSON file, read when it is opened and written after every run.

    A run that is in the file is never done again, on whatever machine.

    Args:
        file: where.
        setting: everything that decides a run beside its cell.

    Raises:
        SubspaceError: the file has runs of another setting; says in what they differ.
    """

    def __init__(self, file: Path, setting: Mapping[str, Any]) -> None:
        self.file, self.setting = file, json.loads(json.dumps(dict(setting)))
        self.facts: dict[str, Any] = {}
        self.runs: dict[tuple[Any, ...], dict[str, Any]] = {}
        if file.is_file():
            body = json.loads(file.read_text(encoding="utf-8"))
            if body["setting"] != self.setting:
                other = sorted(
                    key
                    for key in {*body["setting"], *self.setting}
                    if body["setting"].get(key) != self.setting.get(key)
                )
                raise SubspaceError(
                    f"{file} holds runs of another setting ({', '.join(other)} differ), which these cannot stand"
                    " beside: move it away to begin again, or give another folder by --out."
                )
            self.facts = body["facts"]
            self.runs = {cell.key: run for cell, run in read_runs(body)}

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """Return the finished run of a cell, or None."""
        return self.runs.get(cell.key)

    def add(self, cell: Cell, run: Mapping[str, Any]) -> None:
        """Keep the run of a cell, and write the file."""
        self.runs[cell.key] = {**asdict(cell), **run}
        self.write()

    def write(self) -> None:
        body = {"setting": self.setting, "facts": self.facts, "runs": []}
        lines = ",\n".join(json.dumps(run, separators=(",", ":")) for run in self.runs.values())
        head = json.dumps(body, indent=1).removesuffix("[]\n}")
        write_text_aside(self.file, f"{head}[\n{lines}\n]}}\n")


def read_runs(body: Mapping[str, Any]) -> Iterable[tuple[Cell, dict[str, Any]]]:
    """Yield the runs of a file of results with their cells."""
    names = [each.name for each in fields(Cell)]
    for run in body["runs"]:
        yield Cell(**{name: run[name] for name in names}), run


def reached(k: int, sources: int) -> int:
    """Return the size that a basis of so many sources reaches: they span no more than `RANK` directions each."""
    return min(k, RANK * sources)
