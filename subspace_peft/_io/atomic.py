"""Write aside, then rename: a failed write (full disk, Ctrl-C, kill) leaves the earlier files as they were."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path


def write_aside(target: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary_path)` beside `target`, flush the file to disk, and rename it over `target`.

    Whatever `write` raises comes through; then `target` is untouched and the temporary file is gone.
    """
    write_all_aside({target: write})


def write_all_aside(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write files that belong together as `write_aside` does, all of them before the first is renamed.

    Whatever a writer raises comes through; then every target is untouched and no temporary file is left.
    """
    temporaries: dict[Path, Path] = {}
    try:
        for target, write in writers.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
            os.close(handle)
            temporary = temporaries[target] = Path(name)
            write(temporary)
            _flush(temporary)
        for target, temporary in temporaries.items():
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
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".", suffix=".partial", dir=folder))
    try:
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
    """Write `text` in UTF-8 as `write_aside` does."""
    write_aside(target, lambda path: path.write_text(text, encoding="utf-8"))


def _flush(file: Path) -> None:
    """Have a new file on the disk, with the mode that new files usually have: temporary ones are private."""
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(file, 0o666 & ~umask)
