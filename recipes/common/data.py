"""Checks of a recipe's data before anything is trained on it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from subspace_peft.errors import SubspaceError


def check_rows(where: str, rows: Any, columns: Sequence[str], classes: int | None, *, least: int = 1) -> None:
    """Check one split of a labelled task.

    Args:
        where: task and split, for the message.
        rows: a `datasets.Dataset`.
        columns: those needed beside ``label``, without gaps.
        classes: ``label`` has to be a whole number below this; None: any finite number.
        least: at least so many rows.

    Raises:
        SubspaceError: a column is missing or has gaps, a label is out of range, or there are too few rows; names them.
    """
    if missing := [column for column in (*columns, "label") if column not in rows.column_names]:
        raise SubspaceError(
            f"{where}: there is no column {', '.join(missing)}; there are {', '.join(rows.column_names)}. Rename the"
            " data's columns, or name the right ones in the task's keys."
        )
    for column in columns:
        if empty := sum(value is None for value in rows[column]):
            raise SubspaceError(
                f"{where}: {empty} of {len(rows)} rows have nothing in column {column}. Fill or drop them."
            )
    if len(rows) < least:
        raise SubspaceError(
            f"{where}: {len(rows)} examples, but {least} are needed. Ask for fewer, or bring more data."
        )
    bad = [label for label in rows["label"] if not _fits(label, classes)]
    if bad:
        wanted = "finite numbers" if classes is None else f"whole numbers from 0 to {classes - 1}"
        raise SubspaceError(
            f"{where}: {len(bad)} of {len(rows)} labels do not fit, such as {bad[0]!r}; they have to be {wanted}. -1"
            " marks hidden labels: use a split that has them."
        )


def _fits(label: Any, classes: int | None) -> bool:
    if isinstance(label, bool) or not isinstance(label, (int, float)):
        return False
    return math.isfinite(label) if classes is None else isinstance(label, int) and 0 <= label < classes


def local_tasks(data_dir: str | Path) -> dict[str, dict[str, Any]]:
    """Return the tasks of a folder as `offline.prepare` makes it: name → its facts.

    The facts are those of ``data/<task>/task.json``, and beside them ``classes`` (how many labels, None for a number)
    and ``train`` (lines in its training file).

    Raises:
        SubspaceError: there is none, or one cannot be read.
    """
    from offline.prepare import tasks

    found = {}
    for name, facts in tasks(data_dir).items():
        lines = Path(data_dir, "data", name, "train.jsonl")
        count = sum(bool(line.strip()) for line in lines.open("rb")) if lines.is_file() else 0
        found[name] = {**facts, "classes": len(facts["labels"]) if facts.get("labels") else None, "train": count}
    return found


def local_splits(data_dir: str | Path, task: str) -> dict[str, Any]:
    """Read ``{"train", "validation", "test"}`` of a local task as `datasets.Dataset`s, each from JSON lines.

    Raises:
        SubspaceError: a file is missing, empty, or has a line that is no JSON object; names file and line.
    """
    from datasets import Dataset

    splits = {}
    for split in ("train", "validation", "test"):
        file, rows = Path(data_dir, "data", task, f"{split}.jsonl"), []
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise SubspaceError(f"{file} cannot be read: {error}. A task needs train, validation and test.") from None
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if not isinstance(row, dict):
                    raise SubspaceError(f"{file}, line {number}: no JSON object. Write one per line.")
                rows.append(row)
        if not rows:
            raise SubspaceError(f"{file} holds no examples.")
        try:
            splits[split] = Dataset.from_list(rows)
        except (ValueError, TypeError) as error:
            raise SubspaceError(f"{file}: a column holds values of several kinds: {error}. Make them one.") from None
    return splits


def draw(rows: Any, count: int, seed: int) -> Any:
    """Draw `count` rows of a `datasets.Dataset` by `seed`; all for 0, or where there are no more."""
    return rows.shuffle(seed=seed).select(range(count)) if 0 < count < len(rows) else rows


def refuse_own_adapter(task: str, sources: Iterable[str], known: Iterable[str]) -> None:
    """Refuse sources of the held-out task itself: a basis that has seen its adapter would prove nothing.

    Args:
        task: the held-out task.
        sources: names, folders or Hub ids of the sources.
        known: names of tasks. A source with such a name is of that task; another one may be of any that its name
            contains, as ``org/sts-b_lora_r_8`` is of stsb.

    Raises:
        SubspaceError: names the sources that are, or by their names may be, of `task`.
    """
    known, wanted = set(known), {_squeezed(PurePosixPath(task).name)}
    # Natural Instructions' tasks are numbered, and adapters are called by the number alone
    if number := re.match(r"task0*\d+", PurePosixPath(task).name):
        wanted.add(number.group())
    own = [name for name in sources if (name == task if name in known else wanted & _parts(name))]
    if own:
        raise SubspaceError(
            f"The basis for task {task!r} must not hold that task's own adapter, but {', '.join(own)} is one, or by"
            " its name may be. Leave it out of the sources, or choose another held-out task."
        )


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _squeezed(text: str) -> str:
    return "".join(_words(text))


def _parts(source: str) -> set[str]:
    """Return every run of one to four words of a source's own name, written together."""
    words = _words(PurePosixPath(source.replace("\\", "/")).name)
    return {"".join(words[start : start + size]) for start in range(len(words)) for size in range(1, 5)}
