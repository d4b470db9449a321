"""Write aside, then rename: a failed write (full disk, Ctrl-C, kill) leaves the earlier files as they were."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from .disk import ELSEWHERE, writing

# the target's own name may be as long as the disk allows, so it is no part of the temporary file's
PREFIX, SUFFIX = ".subspace_peft-", ".partial"
_umask = threading.Lock()


def write_aside(target: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary_path)` beside `target`, flush the file to disk, and rename it over `target`.

    Whatever `write` raises comes through; then `target` is untouched and the temporary file is gone.
    """
    write_all_aside({target: write})


def write_all_aside(writers: Mapping[Path, Callable[[Path], object]], remedy: str = ELSEWHERE) -> None:
    """Write files that belong together as `write_aside` does, all of them before the first is renamed.

    Whatever a writer raises comes through; then every target is untouched and no temporary file is left.

    Args:
        writers: target → what writes the file that it is given.
        remedy: what helps where the disk refuses, beside making room.

    Raises:
        DiskError: the disk refuses.
    """
    temporaries: dict[Path, Path] = {}
    try:
        for target, write in writers.items():
            with writing(target, remedy):
                target.parent.mkdir(parents=True, exist_ok=True)
                handle, name = tempfile.mkstemp(prefix=PREFIX, suffix=SUFFIX, dir=target.parent)
                os.close(handle)
                temporary = temporaries[target] = Path(name)
                write(temporary)
                _flush(temporary)
        for target, temporary in temporaries.items():
            with writing(target, remedy):
                os.replace(temporary, target)
    except BaseException:
        for temporary in temporaries.values():
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
        raise


def write_folder_aside(folder: Path, write: Callable[[Path], object]) -> None:
    """Call `write(scratch)` with an empty folder inside `folder`, and rename the files in it over those of `folder`.

    Args:
        folder: Made where it does not exist. Files that `write` does not write stay.
        write: Gets the scratch folder. All files are flushed to disk before the first is renamed.

    Raises whatever `write` raises; then `folder` is as it was, and the scratch folder is gone.
    """
    with writing(folder):
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".", suffix=SUFFIX, dir=folder))
    try:
        with writing(folder):
            write(scratch)
            files = sorted(scratch.iterdir())
            for file in files:
                _flush(file)
            for file in files:
                os.replace(file, folder / file.name)
            scratch.rmdir()
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def write_text_aside(target: Path, text: str) -> None:
    """Write `text` in UTF-8 as `write_aside` does; surrogates, which stand for bytes that are none, as those bytes."""
    write_aside(target, lambda path: path.write_bytes(text.encode("utf-8", "surrogateescape")))


def _flush(file: Path) -> None:
    """Have a new file on the disk, with the mode that new files usually have: temporary ones are private."""
    # Windows flushes files only that are open for writing
    with open(file, "r+b") as stream:
        os.fsync(stream.fileno())
    with _umask:
        # it can be read by setting it only, and of two threads that do so the later one would leave it at 0
        umask = os.umask(0)
        os.umask(umask)
    os.chmod(file, 0o666 & ~umask)
