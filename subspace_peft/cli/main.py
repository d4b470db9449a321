"""``subspace-peft VERB``: argument parsing only, so that ``--help`` needs no heavy import."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from .._version import __version__
from . import recipes
from .building import add_build
from .bundles import add_bundle, add_compress
from .console import leave, make_printable
from .converting import add_export_lora, add_project
from .inspecting import add_analyze, add_inspect, add_report, add_validate
from .language import Flags, flags_of_verb, in_flags, spoken_warnings, verbs_of
from .recipes import add_copy, add_demo, add_run
from .sharing import add_cache, add_push
from .versions import add_complete, add_migrate, add_record_base, add_update

VERBS = (
    add_build,
    add_update,
    add_migrate,
    add_complete,
    add_record_base,
    add_inspect,
    add_validate,
    add_analyze,
    add_report,
    add_project,
    add_export_lora,
    add_bundle,
    add_compress,
    add_push,
    add_cache,
    add_demo,
    add_copy,
    add_run,
)
RESUMED = ("build", "update")
UNSPOKEN = ("run", "demo")  # verbs that run scripts, whose warnings are their own


def parser() -> argparse.ArgumentParser:
    """Return the whole command line."""
    top = argparse.ArgumentParser(
        prog="subspace-peft",
        description="Many LoRA adapters, one frozen basis, kilobyte tasks, in stock PEFT.",
    )
    top.add_argument("--version", action="version", version=f"subspace-peft {__version__}")
    add = top.add_subparsers(dest="verb", metavar="VERB", required=True).add_parser
    for add_verb in VERBS:
        add_verb(add)
    for verb in verbs_of(top).values():
        verb.set_defaults(flags=flags_of_verb(verb))
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; by default those of the process.

    Returns:
        The exit status: 0, 1 for an error on the way, 2 for wrong arguments.
    """
    make_printable(sys.stdout, sys.stderr)
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["run"] and argv[1:2] not in (["-h"], ["--help"]):
        # all that follows belongs to the script, `-m` and other options too, which argparse would claim
        arguments = argparse.Namespace(verb="run", run=recipes.run, script=argv[1:], flags={})
    else:
        arguments = parser().parse_args(argv)
    spoken = nullcontext() if arguments.verb in UNSPOKEN else spoken_warnings(arguments.verb, arguments.flags)
    try:
        with spoken:
            return arguments.run(arguments)
    except KeyboardInterrupt:
        again = "; the same command goes on from the finished modules" if arguments.verb in RESUMED else ""
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
            print(f"subspace-peft {arguments.verb}{who}: {_said(error, arguments.flags)}", file=sys.stderr)
        return 1


def _said(error: Exception, flags: Flags) -> str:
    from .._io.disk import plain

    if isinstance(error, MemoryError):
        return "there is not enough memory for this on this machine."
    return plain(error) if isinstance(error, OSError) else in_flags(error, flags)
