"""Bars of long work, in one manner: shown from two seconds on, on stderr, where they are wanted."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from typing import Any, TypeVar

from ..logging import get_logger, is_progress_bar_enabled

Item = TypeVar("Item")

DELAY = 2.0  # seconds for which work may go on without a bar
_phase = ""
_bar: weakref.ref[Any] | None = None

logger = get_logger()


def progress_bar(iterable: Iterable[Item] | None = None, *, desc: str, unit: str, shown: bool, **more: Any) -> Any:
    """Return a bar of tqdm, over the items of `iterable` or to be updated by hand.

    Args:
        iterable: what to go through.
        desc: what is being done.
        unit: of what.
        shown: whether it is wanted; the package's verbosity may hide it.
        **more: further arguments of tqdm, such as ``total``.
    """
    from tqdm.auto import tqdm

    global _bar
    begin(desc)
    hidden = not (shown and is_progress_bar_enabled())
    made = tqdm(iterable, desc=desc, unit=unit, delay=DELAY, disable=hidden, **more)
    _bar = weakref.ref(made)
    return made


def begin(phase: str) -> None:
    """Note what is being done from now on; where it takes long and has no bar, the command line says it."""
    global _phase
    _phase = phase
    logger.info("%s", phase)


def current() -> str:
    """Return what is being done."""
    return _phase


def open_bar() -> Any:
    """Return the newest bar, a recipe's own too, where it is shown and not at its end; else None."""
    made = None if _bar is None else _bar()
    if made is not None and not made.disable:
        return made
    known = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
    try:
        every = list(getattr(known, "_instances", ()))
    except RuntimeError:  # another thread has just made or closed one
        return None
    # one that is only being made has no start yet
    others = [bar for bar in every if hasattr(bar, "start_t") and not bar.disable]
    return max(others, key=lambda bar: bar.start_t, default=None)
