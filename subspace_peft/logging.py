"""How much this package says, in the manner of transformers: by `logging`'s levels or ``SUBSPACE_PEFT_VERBOSITY``.

    import subspace_peft

    subspace_peft.logging.set_verbosity_info()

By default only warnings and errors are said. Bars of long work are hidden at level ``error`` and above, and after
`disable_progress_bar`. What is raised by Python's `warnings` is filtered there, not by these levels.
"""

from __future__ import annotations

import logging
import os
import sys

from .errors import SubspaceError

VARIABLE = "SUBSPACE_PEFT_VERBOSITY"
LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
ROOT = __name__.rpartition(".")[0]

_bars = True

__all__ = [
    "disable_progress_bar",
    "enable_progress_bar",
    "get_logger",
    "get_verbosity",
    "is_progress_bar_enabled",
    "set_verbosity",
    "set_verbosity_debug",
    "set_verbosity_error",
    "set_verbosity_info",
    "set_verbosity_warning",
]


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to the stderr of the moment, unless the program has handlers of its own, which then get the record."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            self.stream = sys.stderr
            super().emit(record)


_handler = _Handler()
_handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))


def get_logger(name: str | None = None) -> logging.Logger:
    """Return a logger of this package.

    Args:
        name: a module's ``__name__``; None: the package's own, above all others.
    """
    return logging.getLogger(name or ROOT)


def get_verbosity() -> int:
    """Return the package's level, as a number of `logging`."""
    return get_logger().getEffectiveLevel()


def set_verbosity(level: int | str) -> None:
    """Set how much this package says.

    Args:
        level: a number of `logging`, or ``debug``, ``info``, ``warning``, ``error`` or ``critical``.

    Raises:
        SubspaceError: there is no such level.
    """
    if isinstance(level, str):
        if level.lower() not in LEVELS:
            raise SubspaceError(f"There is no verbosity {level!r}; choose one of {', '.join(LEVELS)}.")
        level = LEVELS[level.lower()]
    root = get_logger()
    if _handler not in root.handlers:
        root.addHandler(_handler)
    root.setLevel(level)


def set_verbosity_debug() -> None:
    """Say everything."""
    set_verbosity(logging.DEBUG)


def set_verbosity_info() -> None:
    """Say what is being done, too."""
    set_verbosity(logging.INFO)


def set_verbosity_warning() -> None:
    """Say warnings and errors; this is the default."""
    set_verbosity(logging.WARNING)


def set_verbosity_error() -> None:
    """Say errors only, and show no bars; `warnings.filterwarnings` hides what is a `UserWarning`."""
    set_verbosity(logging.ERROR)


def disable_progress_bar() -> None:
    """Show no bars, whatever `progress` says."""
    global _bars
    _bars = False


def enable_progress_bar() -> None:
    """Show bars again, where `progress` says so."""
    global _bars
    _bars = True


def is_progress_bar_enabled() -> bool:
    """Return whether bars may be shown."""
    return _bars and get_verbosity() < logging.ERROR


def _from_environment() -> None:
    given = os.environ.get(VARIABLE, "")
    if given.lower() in LEVELS:
        set_verbosity(given)
    elif given:
        get_logger().warning("%s=%s: there is no such level; choose one of %s.", VARIABLE, given, ", ".join(LEVELS))


_from_environment()
