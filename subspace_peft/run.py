"""Run a stock script in a process that knows the SUBSPACE method: ``python -m subspace_peft.run script.py …``."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

from .errors import SubspaceError


def run_script(arguments: Sequence[str]) -> None:
    """Run a Python script, or ``-m module``, unchanged, as ``python`` would, with subspace_peft imported.

    Args:
        arguments: the script's path and its own arguments, or ``-m``, a module's name and its arguments.

    Raises:
        SubspaceError: nothing to run, or no such file.
    """
    rest = list(arguments)
    module = rest[:1] == ["-m"]
    if module:
        rest = rest[1:]
    if not rest:
        raise SubspaceError("Say what to run: `subspace-peft run script.py …` or `subspace-peft run -m module …`.")
    if module:
        sys.argv = rest
        # as `python -m` has it: what lies in the working directory can be imported
        sys.path.insert(0, os.getcwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    if not os.path.isfile(rest[0]):
        raise SubspaceError(f"{rest[0]}: there is no such script.")
    sys.argv = rest
    sys.path.insert(0, os.path.dirname(os.path.abspath(rest[0])))
    runpy.run_path(rest[0], run_name="__main__")


def main() -> int:
    """Entry of ``python -m subspace_peft.run``."""
    try:
        run_script(sys.argv[1:])
    except SubspaceError as error:
        print(f"subspace_peft.run: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
