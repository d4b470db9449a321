"""Read text that people write in editors of their own."""

from __future__ import annotations

import codecs
from pathlib import Path

MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_text(file: Path) -> str:
    """Return a file's text: UTF-8, or what its byte order mark says, which Windows's editors and shells write.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is no text.
    """
    data = file.read_bytes()
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8")
    return data.decode(encoding)
