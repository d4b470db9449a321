"""Mappings that people write in YAML or JSON: read strictly, with unknown keys answered by the nearest known ones."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import SubspaceError
from .text import read_text

MOST_BYTES = 100_000_000


def read_settings(file: Path, what: str, remedy: str) -> dict[str, Any]:
    """Read a mapping from a YAML or JSON file.

    Args:
        file: the file.
        what: what it is to hold, for messages: "build".
        remedy: what to give instead, for messages.

    Raises:
        SubspaceError: it cannot be read, holds something else, or has a key twice.
    """
    import yaml

    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError("it is larger than any config")
        text = read_text(file)
        given = json.loads(text, object_pairs_hook=_unique) if file.suffix == ".json" else _read_yaml(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise SubspaceError(
            f"{file}: no {what} can be read from it ({' '.join(str(error).split())}). {remedy}"
        ) from error
    if not isinstance(given, dict):
        raise SubspaceError(f"{file}: it holds a {type(given).__name__}. {remedy}")
    return given


def check_keys(place: Any, given: Mapping[Any, Any], known: Collection[str], hint: str = "") -> None:
    """Check that a mapping has known keys only.

    Args:
        place: the file, and the part of it, for messages.
        given: the mapping.
        known: the keys that it may have.
        hint: a sentence for the end of the message, with a space before it.

    Raises:
        SubspaceError: it has others; names them, and the nearest known ones.
    """
    unknown = []
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            unknown.append(f"{key!r} (did you mean {near[0]!r}?)" if near else repr(key))
    if unknown:
        raise SubspaceError(f"{place}: unknown: {', '.join(unknown)}. Known are {', '.join(known)}.{hint}")


def _unique(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return pairs of keys and values as a dictionary; raise `ValueError` where a key is there twice."""
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice")
        found[key] = value
    return found


def _read_yaml(text: str) -> Any:
    """Read YAML as `yaml.safe_load` does, which keeps only the last of equal keys; raise `ValueError` for these."""
    import yaml

    class Loader(yaml.SafeLoader):
        def flatten_mapping(self, node: Any) -> None:
            # before what `<<` brings in is added, which may repeat keys
            _unique((key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            super().flatten_mapping(node)

    loader = Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
