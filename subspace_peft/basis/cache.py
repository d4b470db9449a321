"""The cache of bases that this machine has fetched: each once, in a folder called by its fingerprint."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .._io.atomic import write_text_aside
from .._io.disk import CACHE, reading, writing
from .._io.untrusted import read_json
from ..errors import SubspaceError
from .stored import CONFIG_FILE, TENSORS_FILE, StoredBasis, read_stored

ORIGIN_FILE = "origin.json"
FINGERPRINT = re.compile(r"[0-9a-f]{64}")


def cache_home() -> Path:
    """Return the folder of this package's own cache.

    It is `SUBSPACE_PEFT_CACHE` where that is set, else `subspace_peft` in the user's cache folder.
    """
    if given := os.environ.get("SUBSPACE_PEFT_CACHE"):
        return Path(given)
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "subspace_peft"
    try:
        return Path.home() / ".cache" / "subspace_peft"
    except RuntimeError:
        # a user without a home, as containers run them
        return Path(tempfile.gettempdir()) / f"subspace_peft-{getattr(os, 'getuid', lambda: 'user')()}"


@dataclass(frozen=True)
class CachedBasis:
    """One entry of the cache.

    Attributes:
        fingerprint: the basis's, and the folder's name.
        folder: where its files are.
        location: Hub id that it was first fetched from.
        revision: commit sha that it was first fetched at.
        bytes: size of its files.
        modules: number of modules; None where its config cannot be read.
        base_model: the model that it was built for.
    """

    fingerprint: str
    folder: Path
    location: str | None
    revision: str | None
    bytes: int
    modules: int | None
    base_model: str | None


def keep(folder: Path, *, fingerprint: str, location: str | None, revision: str | None) -> None:
    """Keep the files of a basis that was fetched into `folder`.

    They are linked where the disk allows it, so that they take no room twice. A cache that cannot be written is no
    reason to fail.

    Args:
        folder: holds both files.
        fingerprint: the basis's.
        location: Hub id that it was fetched from.
        revision: commit sha on the Hub.
    """
    target = cache_home() / "bases" / fingerprint
    with contextlib.suppress(OSError):
        if target.is_dir():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=".part-"))
        try:
            for name in (CONFIG_FILE, TENSORS_FILE):
                _link(Path(folder, name).resolve(), aside / name)
            origin = {"location": location, "revision": revision}
            write_text_aside(aside / ORIGIN_FILE, json.dumps(origin) + "\n")
            aside.rename(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except (OSError, AttributeError, NotImplementedError):
        shutil.copyfile(source, target)


def find(fingerprint: str) -> StoredBasis | None:
    """Return the cached basis with this fingerprint; None where there is none, or its files are damaged."""
    folder = cache_home() / "bases" / fingerprint
    try:
        there = folder.is_dir()
    except OSError:
        return None  # a cache that cannot be read is no reason to fail
    if not FINGERPRINT.fullmatch(fingerprint) or not there:
        return None
    origin = _origin(folder)
    try:
        record = read_stored(folder, location=origin["location"] or str(folder), revision=origin["revision"])
    except SubspaceError:
        return None
    return record if record.fingerprint == fingerprint else None


def entries() -> Iterator[CachedBasis]:
    """Yield all entries, sorted by fingerprint."""
    with reading(cache_home() / "bases"):
        folders = sorted((cache_home() / "bases").glob("*"))
    for folder in folders:
        if not FINGERPRINT.fullmatch(folder.name):
            continue
        try:
            config = read_json(folder / CONFIG_FILE)
            modules, base = len(config["modules"]), config.get("base_model_name_or_path")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            modules = base = None
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        yield CachedBasis(folder.name, folder, **_origin(folder), bytes=size, modules=modules, base_model=base)


def find_entry(fingerprint: str) -> CachedBasis:
    """Return the entry whose fingerprint begins with `fingerprint`.

    Raises:
        SubspaceError: there is none, or there are several; lists them.
    """
    found = [entry for entry in entries() if entry.fingerprint.startswith(fingerprint)]
    if len(found) != 1:
        known = ", ".join(entry.fingerprint[:12] for entry in found or entries()) or "nothing"
        what = "no basis" if not found else f"{len(found)} bases"
        raise SubspaceError(f"The cache has {what} whose fingerprint begins with {fingerprint!r}; there is {known}.")
    return found[0]


def remove(entry: CachedBasis) -> None:
    """Remove an entry's files.

    Raises:
        OSError: the disk refuses.
    """
    with writing(entry.folder, CACHE):
        shutil.rmtree(entry.folder)


def verify(entry: CachedBasis) -> str | None:
    """Read all of an entry's files; return what is wrong with them, or None."""
    # numpy is for this alone
    from .arrays import StoredReader

    try:
        record = read_stored(entry.folder, location=str(entry.folder), revision=None)
        if record.fingerprint != entry.fingerprint:
            return f"its fingerprint is {record.fingerprint}"
        for _ in StoredReader(record).verify():
            pass
    except SubspaceError as error:
        return str(error)
    return None


def _origin(folder: Path) -> dict[str, str | None]:
    try:
        found = read_json(folder / ORIGIN_FILE)
        return {key: found[key] if isinstance(found[key], str) else None for key in ("location", "revision")}
    except (OSError, ValueError, KeyError, TypeError):
        return {"location": None, "revision": None}
