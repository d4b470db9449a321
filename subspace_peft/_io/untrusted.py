"""Checks of what a file from elsewhere says: JSON, numbers, names and patterns, each before it is used."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

# safetensors' own limit for a header; no config that we or PEFT write comes near it
MOST_JSON_BYTES = 100_000_000
# no layer is wider; a larger number would only be there to have something of that size allocated
MOST_DIRECTIONS = 1 << 20
MOST_PATTERN = 2000  # characters of a regular expression with repeats
MOST_REPEATS = 5


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in `file`.

    Raises:
        ValueError: it is not a regular file, too large, not UTF-8, not JSON, nested too deeply, or not an object.
        OSError: it cannot be read.
    """
    # reading a pipe or a device need never end
    if file.exists() and not file.is_file():
        raise ValueError("it is not a regular file")
    size = file.stat().st_size
    if size > MOST_JSON_BYTES:
        raise ValueError(f"it has {size:,} bytes, more than any config")
    return parse_json(file.read_bytes())


def parse_json(text: str | bytes) -> dict[str, Any]:
    """Return the JSON object in `text`.

    Raises:
        ValueError: it is not JSON, nested too deeply, or not an object.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"it is a JSON {type(found).__name__}, not an object")
    return found


def is_whole(value: Any, least: int = 1, most: int = MOST_DIRECTIONS) -> bool:
    """Return whether `value` is an integer from `least` to `most`, and not a boolean."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_finite(value: Any) -> bool:
    """Return whether `value` is a number that a float can hold, and not a boolean."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def is_sha256(value: Any) -> bool:
    """Return whether `value` is a sha256 as `hexdigest` gives it: 64 digits, lower case."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def is_name(value: Any, most: int = 4096) -> bool:
    """Return whether `value` can be the name of a module or a place: text without control characters.

    Args:
        value: the value.
        most: characters that it may have.
    """
    return isinstance(value, str) and 0 < len(value) <= most and re.search(r"[\x00-\x1f\x7f]", value) is None


def pattern_problem(pattern: str) -> str | None:
    """Return what is wrong with a regular expression for module names, or None.

    Python's matcher tries every way to divide a name among the repeats. Nested repeats, or many in a row, take it
    exponential time, which a file from elsewhere may be made for.
    """
    if len(pattern) > MOST_PATTERN and _repeats(pattern):
        return f"it has {len(pattern):,} characters"
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"it is not a regular expression ({error})"
    if re.search(r"\)[*+{]", _plain(pattern)):
        return "it repeats a group, which can take exponential time to match; repeat single characters, as in `.*`"
    if _repeats(pattern) > MOST_REPEATS:
        return f"it has more than {MOST_REPEATS} repeats, which can take exponential time to match"
    if re.search(r"\(\?P=|\\[1-9]", pattern):
        return "it refers back to a group, which can take exponential time to match"
    return None


def _plain(pattern: str) -> str:
    # a name has few digits: \d+ in a row costs nothing
    bare = re.sub(r"(\\d|\[0-9\])[*+]", "0", pattern)
    bare = re.sub(r"\\.", "x", bare, flags=re.DOTALL)
    return re.sub(r"\[\^?\]?[^\]]*\]", "x", bare)


def _repeats(pattern: str) -> int:
    return len(re.findall(r"[*+{]", _plain(pattern)))


def is_revision(value: Any) -> bool:
    """Return whether `value` can be a branch, tag or commit.

    Git allows no ``..`` in one; it would lead out of the Hub's cache.
    """
    return is_name(value, most=255) and ".." not in value and not value.startswith(("/", "\\"))
