"""A sign of life: what a verb is doing, where it would be silent for longer than two seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

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
    end = threading.Event()
    thread = threading.Thread(target=_beat, args=(end,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _beat(end: threading.Event) -> None:
    begun = spoke = time.monotonic()
    phase, width = progress.current(), 0
    while not end.wait(TICK):
        now = time.monotonic()
        if progress.current() != phase:
            phase, begun = progress.current(), now
        bar = progress.open_bar()
        if bar is not None and time.time() - bar.start_t > progress.DELAY:
            width = 0
            if now - spoke > SILENCE:
                spoke = now
                bar.refresh()
                # a bar that has never been drawn, as it thinks, would leave what is drawn now behind at its end
                bar.last_print_t = time.time()
        elif now - spoke > SILENCE:
            spoke = now
            said = f"{phase} ({now - begun:.0f} s)"
            sys.stderr.write(f"\r{said:<{width}}")
            sys.stderr.flush()
            width = len(said)
    if width:
        # what stood there is no part of the result
        sys.stderr.write(f"\r{'':<{width}}\r")
        sys.stderr.flush()
