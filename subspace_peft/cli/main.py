"""``subspace-peft VERB``: run a verb, say its errors in the user's words, and return the exit status."""

from __future__ import annotations

import argparse
import atexit
import gc
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from . import recipes
from .console import leave, make_printable
from .language import Flags, in_flags, spoken_warnings
from .parsers import left_over
from .pulse import pulse
from .verbosity import verbosity
from .verbs import parser as parser

RESUMED = {"build": "modules", "update": "modules", "continual": "phases", "demo": "adapters and runs"}
UNSPOKEN = ("run", "demo")  # verbs that run scripts, whose warnings are their own
COUNTED = {"v": "verbose_first", "q": "quiet_first"}
COUNTS = re.compile(r"-(v+|q+)|--(v)erbose|--(q)uiet")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; by default those of the process.

    Returns:
        The exit status: 0, 1 for an error on the way, 2 for wrong arguments.
    """
    make_printable(sys.stdout, sys.stderr)
    arguments = _parsed(list(sys.argv[1:] if argv is None else argv))
    if arguments.run is None:
        # no verb, or a verb of others without one of these
        arguments.help_of.print_help()
        return 0
    if argv is None and arguments.verb not in UNSPOKEN:
        # the process ends with this: Python would go through all objects once more before, for seconds after PEFT
        atexit.register(gc.freeze)
    try:
        with verbosity(arguments), _spoken(arguments):
            return int(arguments.run(arguments))
    except KeyboardInterrupt:
        done = RESUMED.get(arguments.verb)
        again = f"; the same command goes on from the finished {done}" if done else ""
        print(f"interrupted; nothing half-written is left behind{again}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of the output, such as `head`, has what it wanted; Python would complain again at its end
        leave(sys.stdout)
        return 141
    except Exception as error:
        from ..errors import ProcessError, SubspaceError

        if not isinstance(error, (SubspaceError, OSError, MemoryError)):
            raise
        # of several processes that a launcher started, the one that failed speaks for itself, and the first of the
        # others for the rest
        rank = int(os.environ.get("RANK") or 0) if int(os.environ.get("WORLD_SIZE") or 1) > 1 else None
        if not (rank and isinstance(error, ProcessError)):
            who = "" if rank is None else f", process {rank} of {os.environ['WORLD_SIZE']} on {platform.node()}"
            print(f"subspace-peft {_named(arguments)}{who}: {_said(error, arguments.flags)}", file=sys.stderr)
        return 1


def _parsed(argv: list[str]) -> argparse.Namespace:
    """Return the arguments; of `run`, all that follows belongs to the script, which argparse would claim."""
    first, counts = 0, dict.fromkeys(COUNTED.values(), 0)
    while first < len(argv) and (found := COUNTS.fullmatch(argv[first])):
        letters = found[1] or found[2] or found[3]
        counts[COUNTED[letters[0]]] += len(letters)
        first += 1
    if argv[first : first + 1] in (["bundle"], ["cache"], ["continual"]):
        while COUNTS.fullmatch(" ".join(argv[first + 1 : first + 2])):
            argv.insert(0, argv.pop(first + 1))  # between these and their own verbs, as before them
            first += 1
    if argv[first : first + 1] == ["help"]:
        argv[first:] = [*argv[first + 1 :], "--help"]  # as git and others have it
    if first < len(argv) and not argv[first].startswith("-"):
        argv[first] = argv[first].replace("_", "-")  # a verb as Python's function is called
    if argv[first : first + 1] == ["run"] and argv[first + 1 : first + 2] not in (["-h"], ["--help"]):
        return argparse.Namespace(verb="run", run=recipes.run, script=argv[first + 1 :], flags={}, **counts)
    top = parser()
    arguments, left = top.parse_known_args(argv)
    if left:
        own = getattr(arguments, "parsed_by", top)
        own.error(left_over(left, own))
    return arguments


def _named(arguments: argparse.Namespace) -> str:
    """Return the verb as it was typed: ``bundle ls``."""
    return " ".join(filter(None, (arguments.verb, getattr(arguments, "what", None))))


@contextmanager
def _spoken(arguments: argparse.Namespace) -> Iterator[None]:
    """Say warnings in the verb's words within, and what is being done where that takes long."""
    with ExitStack() as stack:
        if arguments.quiet > 1:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        if arguments.verb not in UNSPOKEN:
            stack.enter_context(spoken_warnings(_named(arguments), arguments.flags))
        first = os.environ.get("RANK", "0") == "0"
        shown = first and arguments.verb != "run" and not arguments.quiet
        stack.enter_context(pulse(arguments.verb, shown))
        yield


def _said(error: Exception, flags: Flags) -> str:
    from .._io.disk import plain

    if isinstance(error, MemoryError):
        return "there is not enough memory for this on this machine."
    return plain(error) if isinstance(error, OSError) else in_flags(error, flags)
