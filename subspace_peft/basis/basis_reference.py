"""Where a basis is to be found, and which one it has to be: one value for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class BasisReference:
    """Where a basis is to be found, and which one it has to be. `resolve_reference` finds it.

    Attributes:
        location: a folder (absolute, or relative to `near` or to the working directory), or a Hub id; None: not
            recorded, so that only the fingerprint leads to it.
        revision: branch, tag or commit sha on the Hub.
        fingerprint: the sha256 that the basis must have; None for any.
        near: folder in which a relative location is looked for first, as a task's own folder.
        token: as in huggingface_hub.
        exact: whether to look at `location` and nowhere else, whatever this process or machine has seen before.
    """

    location: str | None = None
    revision: str | None = None
    fingerprint: str | None = None
    near: Path | None = None
    token: str | bool | None = field(default=None, repr=False)
    exact: bool = False
