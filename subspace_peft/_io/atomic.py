"""Write aside, then rename: a failed write (full disk, Ctrl-C, kill) leaves the earlier files as they were."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path


def write_aside(target: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary_path)` beside `target`, flush it to disk, and rename it over `target`.

    Raises whatever `write` raises; then `target` is untouched and the temporary file is gone.
    """
    write_all_aside({target: write})


def write_all_aside(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """`write_aside` for files that belong together: all are written before the first is renamed.

    Raises whatever a writer raises; then every target is untouched and no temporary file is left.
    """
    temporaries: dict[Path, Path] = {}
    try:
        for target, write in writers.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
            os.close(handle)
            temporary = temporaries[target] = Path(name)
            write(temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            # mkstemp makes private files; a basis that others on the machine are to read needs the usual mode
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
        for target, temporary in temporaries.items():
            os.replace(temporary, target)
    except BaseException:
        for temporary in temporaries.values():
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
        raise


def write_text_aside(target: Path, text: str) -> None:
    """`write_aside` for UTF-8 text."""
    write_aside(target, lambda path: path.write_text(text, encoding="utf-8"))
