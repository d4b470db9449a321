"""Print on every console: also where it lacks a character, and where the reader of the output has gone."""

from __future__ import annotations

import codecs
import os
from contextlib import suppress
from typing import IO, Any

HANDLER = "subspace_peft.plain"
PLAIN = {
    "→": "->",
    "←": "<-",
    "↔": "<->",
    "↑": "^",
    "↓": "v",
    "…": "...",
    "–": "-",
    "—": "-",
    "−": "-",
    "·": "*",
    "×": "x",
    "±": "+-",
    "≤": "<=",
    "≥": ">=",
    "≠": "!=",
    "≈": "~",
    "‖": "|",
    "√": "sqrt ",
    "✓": "yes",
    "✗": "no",
    "•": "*",
    "’": "'",
    "‘": "'",
    "“": '"',
    "”": '"',
    "„": '"',
    "Δ": "d",
    "Σ": "S",
    "σ": "sigma",
    "ᵀ": "'",
}


def plain(text: str, encoding: str) -> str:
    r"""Return `text` in characters that `encoding` has: ``->`` for an arrow, ``\u4e2d`` for what has no stand-in."""
    return text.encode(encoding, HANDLER).decode(encoding)


def make_printable(*streams: Any) -> None:
    """Let a console print what its encoding lacks in plain characters, where Python would raise.

    Args:
        streams: such as `sys.stdout`. Those that handle errors in a way of their own stay as they are.
    """
    for stream in streams:
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=HANDLER)


def leave(stream: IO[str]) -> None:
    """Let what is still to be written to a stream whose reader has gone go nowhere; Python would complain at its end.

    A stream without a descriptor, as notebooks have them, is left alone.
    """
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    said = ""
    for character in error.object[error.start : error.end]:
        said += PLAIN.get(character) or character.encode("ascii", "backslashreplace").decode("ascii")
    return said, error.end


codecs.register_error(HANDLER, _stand_in)
