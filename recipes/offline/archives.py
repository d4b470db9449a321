"""Unpack a wheel, a zip or a tar file without letting any member land outside the target folder."""

from __future__ import annotations

import fnmatch
import shutil
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from subspace_peft.errors import BadFileError


def unpack(archive: Path, folder: Path, members: Sequence[str] = ("*",)) -> int:
    """Write the regular files of `archive` whose names match one of the glob patterns `members` into `folder`.

    Links, devices and empty folders are left out: no package of data needs them, and a link is one way out of the
        folder.

    Returns:
        How many files were written.

    Raises:
        BadFileError: the archive is damaged or of another kind, or a member's name is absolute or climbs out with
            ``..``.
    """
    written = 0
    try:
        for name, stream in _files(archive):
            target = inside(folder, name, archive)
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in members):
                target.parent.mkdir(parents=True, exist_ok=True)
                with stream, open(target, "wb") as file:
                    shutil.copyfileobj(stream, file)
                written += 1
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, NotImplementedError) as error:
        raise BadFileError(
            f"{archive}: cannot be unpacked ({error}). The file is truncated or no archive: delete it and fetch it"
            " again."
        ) from error
    return written


def inside(folder: Path, name: str, archive: Path) -> Path:
    """Return where member `name` goes below `folder`.

    Raises:
        BadFileError: that would be anywhere else.
    """
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or ".." in parts or parts[0].startswith("/") or ":" in parts[0]:
        raise BadFileError(
            f"{archive}: member {name!r} would be written outside the folder it is unpacked into. Nothing was"
            " unpacked: this archive is not to be trusted."
        )
    return folder.joinpath(*parts)


def _files(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                if not info.is_dir():
                    yield info.filename, opened.open(info)
        return
    with tarfile.open(archive) as opened:
        for member in opened:
            stream = opened.extractfile(member) if member.isreg() else None
            if stream is not None:
                yield member.name, stream
