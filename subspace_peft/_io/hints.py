"""What to do with a folder that holds something else than was asked for: a bundle where a basis was, for instance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .occupied import BUNDLE, CLUSTERS, LORA, TASK, look

NEXT = {
    BUNDLE: "`subspace-peft bundle ls {place}` lists its tasks",
    LORA: "`subspace-peft project {place} --basis BASIS` turns it into a task",
    TASK: "`subspace-peft inspect {place}` says what it is",
}


def hint(place: Any) -> str:
    """Return a sentence, with a space before it, about what a folder holds; empty where that is nothing known.

    Args:
        place: a folder, or what may be anything else, such as an id.
    """
    try:
        folder = Path(place).expanduser()
        found = look(folder) if folder.is_dir() else []
    except (OSError, RuntimeError, TypeError, ValueError):
        return ""
    for each in found:
        if each.kind == CLUSTERS:
            bases = sorted(str(one.parent) for one in folder.glob("*/basis_config.json"))
            return f" It holds clusters of bases; name one of them: {', '.join(bases)}." if bases else ""
        if each.kind in NEXT and not (each.kind == BUNDLE and each.more):
            return f" It holds {each.kind}: {NEXT[each.kind].format(place=place)}."
    return ""
