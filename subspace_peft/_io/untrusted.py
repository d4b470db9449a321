"""What files from strangers may say: JSON, numbers, names and patterns, each held against what is sane before it is
used."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

# safetensors' own limit for a header; no config that we or PEFT write comes near it
MOST_JSON_BYTES = 100_000_000
# no layer is wider; numbers beyond would only be meant to make something of that size
MOST_DIRECTIONS = 1 << 20
MOST_PATTERN = 2000
MOST_REPEATS = 5


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`.

    Raises:
        ValueError: no regular file, too large, no UTF-8, no JSON, nested too deeply, or no object; says which.
        OSError: it cannot be read.
    """
    # a pipe or a device would be read for ever
    if file.exists() and not file.is_file():
        raise ValueError("it is no regular file")
    size = file.stat().st_size
    if size > MOST_JSON_BYTES:
        raise ValueError(f"it has {size:,} bytes, more than any config")
    return parse_json(file.read_bytes())


def parse_json(text: str | bytes) -> dict[str, Any]:
    """The JSON object in `text`. Raises `ValueError` where it is none."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"it is a JSON {type(found).__name__}, not an object")
    return found


def is_whole(value: Any, least: int = 1, most: int = MOST_DIRECTIONS) -> bool:
    """Whether `value` is an integer from `least` to `most`; booleans are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_finite(value: Any) -> bool:
    """Whether `value` is a number that a float can hold; booleans are none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def is_sha256(value: Any) -> bool:
    """Whether `value` is a sha256 as hexdigest gives it."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def is_name(value: Any, most: int = 4096) -> bool:
    """Whether `value` can be the name of a module or a place: text without control characters."""
    return isinstance(value, str) and 0 < len(value) <= most and re.search(r"[\x00-\x1f\x7f]", value) is None


def pattern_problem(pattern: str) -> str | None:
    """What is wrong with a regular expression for module names, or None.

    Python's matcher tries every way to divide a name among the repeats: nested ones, or many in a row, take it longer
    than anybody waits, and a file from somebody else may be made to do that.
    """
    if len(pattern) > MOST_PATTERN and _repeats(pattern):
        return f"it has {len(pattern):,} characters"
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"it is no regular expression ({error})"
    if re.search(r"\)[*+{]", _plain(pattern)):
        return "it repeats a group, which can take for ever to match; repeat single characters, as in `.*`"
    if _repeats(pattern) > MOST_REPEATS:
        return f"it has more than {MOST_REPEATS} repeats, which can take for ever to match"
    if re.search(r"\(\?P=|\\[1-9]", pattern):
        return "it refers back to a group, which can take for ever to match"
    return None


def _plain(pattern: str) -> str:
    # digits are few and far between in a name: \d+ in a row costs nothing
    bare = re.sub(r"(\\d|\[0-9\])[*+]", "0", pattern)
    bare = re.sub(r"\\.", "x", bare, flags=re.DOTALL)
    return re.sub(r"\[\^?\]?[^\]]*\]", "x", bare)


def _repeats(pattern: str) -> int:
    return len(re.findall(r"[*+{]", _plain(pattern)))


def is_revision(value: Any) -> bool:
    """Whether `value` can be a branch, tag or commit: git knows none with ``..``, which would climb out of the Hub's
    cache."""
    return is_name(value, most=255) and ".." not in value and not value.startswith(("/", "\\"))
