"""One JSON file per finished training run, from which an interrupted comparison resumes."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from subspace_peft._io.atomic import write_text_aside

from .methods import Method

logger = logging.getLogger(__name__)
LIBRARIES = ("torch", "transformers", "peft", "subspace-peft")


def plain(value: Any) -> Any:
    """Return `value` as strict JSON holds it.

    Numbers that are not finite become null, NumPy's and torch's scalars numbers.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, bool, int, float)) else str(value)


def canonical(value: Any) -> str:
    """Return one text per value, whatever the order of its keys."""
    return json.dumps(plain(value), sort_keys=True, ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """Return the sha256 of `canonical(value)`, in hex."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


class RunCache:
    """The finished runs of one comparison.

    A run is known by everything that decides it: the comparison's settings, the method with its adapter's
    configuration (a basis as its fingerprint), learning rate, seed, and the versions of the libraries that trained it.

    Args:
        folder: where the files are; made when the first is written. Several comparisons may share one.
        settings: what all runs of this comparison have in common: task, base model, budget, data.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.settings = {**plain(settings), "versions": {name: version(name) for name in LIBRARIES}}

    def identity(self, method: Method, rate: float | None, seed: int) -> dict[str, Any]:
        """Return all that decides the run."""
        return {"settings": self.settings, "method": method.identity(seed), "rate": rate, "seed": seed}

    def file(self, method: Method, rate: float | None, seed: int) -> Path:
        """Return the run's file: readable in front, its key behind."""
        key = digest(self.identity(method, rate, seed))[:16]
        name = re.sub(r"[^a-z0-9]+", "-", method.name.lower()).strip("-")
        return self.folder / f"{name}-{'untrained' if rate is None else f'{rate:g}'}-seed{seed}-{key}.json"

    def read(self, method: Method, rate: float | None, seed: int) -> dict[str, Any] | None:
        """Return the kept result of this very run, or None where there is none or its file is damaged."""
        file = self.file(method, rate, seed)
        if not file.is_file():
            return None
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            intact = kept["sha256"] == digest({"identity": kept["identity"], "result": kept["result"]})
            same = kept["identity"] == plain(self.identity(method, rate, seed))
        except (OSError, ValueError, KeyError, TypeError):
            intact = same = False
        if intact and same and isinstance(kept["result"], dict):
            return kept["result"]
        logger.warning("%s is damaged: that run is done again.", file)
        return None

    def write(self, method: Method, rate: float | None, seed: int, result: Mapping[str, Any]) -> dict[str, Any]:
        """Keep the result of a finished run; return it as `read` will."""
        body = {"identity": plain(self.identity(method, rate, seed)), "result": plain(result)}
        write_text_aside(self.file(method, rate, seed), json.dumps({**body, "sha256": digest(body)}, indent=1) + "\n")
        return body["result"]
