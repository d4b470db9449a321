"""``-v`` and ``-q``: how much the command line says, of this package and of the libraries below it."""

from __future__ import annotations

import logging
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager

from ..logging import LEVELS, VARIABLE, get_logger, set_verbosity
from .parsers import RUNS, grouped

# said as bitsandbytes is imported, of kernels that nothing here needs: (logger, how the record begins)
NOISE = (("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"),)


class _Hidden(logging.Filter):
    """Drops the records that begin with a text."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.name)


def add_verbosity(parser: ArgumentParser, first: bool = False) -> None:
    """Add the flags of how much is said.

    Args:
        parser: gets them.
        first: whether these stand before the verb.
    """
    group = parser if first else grouped(parser, RUNS)
    ends = "_first" if first else ""
    group.add_argument(
        "-v",
        "--verbose",
        dest=f"verbose{ends}",
        action="count",
        default=0,
        help="say more: details of the result and what is being done; twice: everything",
    )
    group.add_argument(
        "-q",
        "--quiet",
        dest=f"quiet{ends}",
        action="count",
        default=0,
        help="say less: no progress bars; twice: no warnings",
    )


@contextmanager
def verbosity(args: Namespace) -> Iterator[None]:
    """Say within as much as a verb's arguments ask for, see `apply`; a program that calls the verb stays as it was."""
    logger = get_logger()
    level, handlers = logger.level, list(logger.handlers)
    apply(args)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.handlers[:] = handlers


def apply(args: Namespace) -> None:
    """Set how much is said by a verb's arguments, or else by ``SUBSPACE_PEFT_VERBOSITY``; leave one pair of counts.

    Sets ``args.verbose``, how much more is asked for, and ``args.quiet``, how much less.
    """
    given = getattr(args, "verbose", 0) + getattr(args, "verbose_first", 0)
    less = getattr(args, "quiet", 0) + getattr(args, "quiet_first", 0)
    if not given and not less:
        level = LEVELS.get(os.environ.get(VARIABLE, "").lower(), logging.WARNING)
        given = (logging.WARNING - level) // 10 if level < logging.WARNING else 0
        less = (level - logging.WARNING) // 10 if level > logging.WARNING else 0
    args.verbose, args.quiet = max(given - less, 0), max(less - given, 0)
    steps = [logging.CRITICAL, logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG]
    set_verbosity(steps[min(max(2 + args.verbose - args.quiet, 0), 4)])
    for name, beginning in NOISE:
        logger = logging.getLogger(name)
        for each in [each for each in logger.filters if isinstance(each, _Hidden)]:
            logger.removeFilter(each)
        if args.verbose < 2:
            logger.addFilter(_Hidden(beginning))
