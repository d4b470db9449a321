"""What a reference's text means: a folder of this machine, or a Hub id with a revision and a place inside; and when
two mean one model."""

from __future__ import annotations

import os
import re
from pathlib import Path


def looks_like_path(text: str) -> bool:
    """Whether `text` can only mean a folder of this machine, never a Hub id such as ``org/name``."""
    # revisions such as refs/pr/3, and folders inside a repository, have slashes of their own
    name = re.split("[@:]", text, maxsplit=1)[0]
    return os.path.isabs(text) or text.startswith((".", "~")) or name.count("/") > 1 or "\\" in text


def split_revision(text: str) -> tuple[str, str | None]:
    """``org/name@revision`` → ``("org/name", "revision")``; without an ``@``, None."""
    name, _, revision = text.partition("@")
    return name, revision or None


def split_inside(text: str) -> tuple[str, str | None, str | None]:
    """``org/name@revision:folder/inside`` → its three parts; None for those that are not given."""
    # neither repository names nor git revisions may hold a colon
    outside, _, inside = text.partition(":")
    return *split_revision(outside), inside.strip("/") or None


def same_model(base: str | None, model: str | None) -> bool:
    """Whether two names mean one base model: the same place, or a Hub id and its older form without an owner
    (``FacebookAI/roberta-base``, ``roberta-base``). One that does not say may be any.
    """
    if not base or not model or Path(base) == Path(model):
        return True
    short, long = sorted((base, model), key=len)
    return "/" not in short and long.count("/") == 1 and long.endswith(f"/{short}")
