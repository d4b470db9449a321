"""The finished cells of a task, in the committed results: one line each, found again on any machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import RunCache
from common.run_cache import digest, plain

from subspace_peft._io.atomic import write_text_aside
from subspace_peft.errors import SubspaceError

from .rows import Row


class Cells(RunCache):
    """The finished runs on one task: its file of results first, then the local cache.

    In the results a cell is known by what decides it on every machine: a fleet's basis by the fleet's tasks, budget
    and starts, not by its bytes, which another processor rounds otherwise; the versions of the libraries stand in
    machine.json. So a machine that has the results alone trains no cell twice, and no fleet for cells that are there.

    Args:
        folder: of the local cache.
        settings: what all runs of the task have in common.
        file: of the task's results; written after every cell.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], file: Path) -> None:
        super().__init__(folder, settings)
        self.results, self._common = file, plain(settings)
        listed = json.loads(file.read_text(encoding="utf-8"))["cells"] if file.is_file() else []
        self._cells: dict[str, dict[str, Any]] = {cell["key"]: cell for cell in listed}

    def key(self, row: Row, rate: float | None, seed: int) -> str:
        """Return the cell's key: of what decides it on any machine."""
        return digest({"settings": self._common, "row": row.described(), "rate": rate, "seed": seed})[:16]

    def read(self, method: Row, rate: float | None, seed: int) -> dict[str, Any] | None:  # type: ignore[override]
        """Return the cell's result, or None."""
        if (cell := self._cells.get(self.key(method, rate, seed))) is not None:
            return cell["result"]
        found = super().read(method, rate, seed)
        if found is not None:
            self._add(method, rate, seed, found)
        return found

    def write(self, method: Row, rate: float | None, seed: int, result: Mapping[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        """Keep a finished cell in both places; return its result as `read` will."""
        kept = super().write(method, rate, seed, result)
        self._add(method, rate, seed, kept)
        return self._cells[self.key(method, rate, seed)]["result"]

    def _add(self, row: Row, rate: float | None, seed: int, result: Mapping[str, Any]) -> None:
        key = self.key(row, rate, seed)
        for cell in self._cells.values():
            if cell["result"]["data"] != result["data"]:
                raise SubspaceError(
                    f"{self.results} has cells of other examples ({cell['result']['data'][:12]}) than this machine's"
                    f" ({result['data'][:12]}): they cannot stand in one table. Move that file away to begin again."
                )
        self._cells[key] = {"row": row.name, "rate": rate, "seed": seed, "key": key, "result": _rounded(result)}
        ordered = sorted(self._cells.values(), key=lambda cell: (cell["row"], cell["seed"], cell["rate"] or 0.0))
        lines = ",\n".join(json.dumps(cell, separators=(",", ":")) for cell in ordered)
        write_text_aside(self.results, f'{{"task":{json.dumps(self._common["task"])},"cells":[\n{lines}\n]}}\n')


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return round(value, 5) if isinstance(value, float) else value
