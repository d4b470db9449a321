"""What a reference's text means: a folder of this machine, or a Hub id with a revision."""

from __future__ import annotations

import os


def looks_like_path(text: str) -> bool:
    """Whether `text` can only mean a folder of this machine, never a Hub id such as ``org/name``."""
    return os.path.isabs(text) or text.startswith((".", "~")) or text.count("/") > 1 or "\\" in text


def split_revision(text: str) -> tuple[str, str | None]:
    """``org/name@revision`` → ``("org/name", "revision")``; without an ``@``, None."""
    name, _, revision = text.partition("@")
    return name, revision or None
