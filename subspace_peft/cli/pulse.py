"""A sign of life: what a verb is doing, where it would be silent for longer than two seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from .._io import progress

SILENCE = 1.2  # seconds without a word after which one is said
TICK = 0.3


@contextmanager
def pulse(verb: str, shown: bool) -> Iterator[None]:
    """Say within, on stderr, what is being done where no bar does; a bar that stands still is drawn again.

    Args:
        verb: the verb's name, said until the work says what it is doing.
        shown: whether anything is to be said; it is only on a terminal, and in no file.
    """
    if not (shown and sys.stderr.isatty()):
        yield
        return
    progress.begin(f"loading what {verb} needs")
    line, end = _Line(sys.stderr), threading.Event()
    thread = threading.Thread(target=_beat, args=(line, end), daemon=True)
    thread.start()
    out = _Clearing(sys.stdout, line) if sys.stdout is not None and sys.stdout.isatty() else sys.stdout
    try:
        with redirect_stdout(out), redirect_stderr(_Clearing(sys.stderr, line)):
            yield
    finally:
        end.set()
        thread.join()
        line.clear()


class _Line:
    """The line of a terminal on which is said what is being done, until anything else is written.

    Attributes:
        spoke: when something was last written.
    """

    def __init__(self, stream: Any) -> None:
        self._stream, self._width, self._lock = stream, 0, threading.Lock()
        self.spoke = time.monotonic()

    def say(self, text: str) -> None:
        with self._lock:
            self._stream.write(f"\r{text:<{self._width}}")
            self._stream.flush()
            self._width, self.spoke = len(text), time.monotonic()

    def clear(self) -> None:
        """Take away what stands there: it is no part of the result."""
        with self._lock:
            if self._width:
                self._stream.write(f"\r{'':<{self._width}}\r")
                self._stream.flush()
            self._width, self.spoke = 0, time.monotonic()


class _Clearing:
    """A stream that takes the line away before it writes."""

    def __init__(self, stream: Any, line: _Line) -> None:
        self._own, self._line = stream, line

    def write(self, text: str) -> int:
        self._line.clear()
        return int(self._own.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def _beat(line: _Line, end: threading.Event) -> None:
    begun, phase = time.monotonic(), progress.current()
    while not end.wait(TICK):
        now = time.monotonic()
        if progress.current() != phase:
            phase, begun = progress.current(), now
        bar = progress.open_bar()
        if bar is not None and time.time() - bar.start_t > progress.DELAY:
            if now - line.spoke > SILENCE:
                line.clear()
                bar.refresh()
                # a bar that has never been drawn, as it thinks, would leave what is drawn now behind at its end
                bar.last_print_t = time.time()
        elif now - line.spoke > SILENCE:
            line.say(f"{phase} ({now - begun:.0f} s)")
