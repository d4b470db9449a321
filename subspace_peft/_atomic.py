"""Write aside, then rename: a failed write (full disk, Ctrl-C, kill) leaves the earlier file as it was."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_aside(target: Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary_path)` beside `target`, flush it to disk, and rename it over `target`.

    Raises whatever `write` raises; then `target` is untouched and the temporary file is gone.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes private files; a basis that others on the machine are to read needs the usual mode
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise


def write_text_aside(target: Path, text: str) -> None:
    """`write_aside` for UTF-8 text."""

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    write_aside(target, write)
