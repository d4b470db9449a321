"""``subspace-peft completion``: completion of verbs, options and places in the shell, by shtab."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, Namespace
from typing import Any

from ..errors import SubspaceError
from .common import Add

SHELLS = ("bash", "zsh", "tcsh")
# what a value is, by what help calls it
FOLDERS = ("FOLDER",)
PLACES = ("ADAPTER", "BASIS", "BUNDLE", "FILE", "LORA", "MODEL", "PATH", "PLACE", "PLAN", "SCRIPT …", "TASK")
# in shtab's script for bash: places whose names have spaces, of which the shell hands on what was typed, quotes and
# backslashes included; and options after one that takes several values
TYPED = 'local typed="${1//\\\\/}"; typed="${typed#[\\"\\\']}"; '
BASH = (
    ("compgen -f -- $1", f'{TYPED}compgen -f -- "$typed"'),
    ("compgen -d -- $1", f'{TYPED}compgen -d -- "$typed"'),
    (
        """"$completing_word" == -* &&
        ( -z "$current_action_compgen" || "$current_action_is_positional" = true ) ]]""",
        '"$completing_word" == -* ]]',
    ),
)
HOW = """\
# bash: eval "$(subspace-peft completion bash)" in ~/.bashrc
# zsh:  subspace-peft completion zsh > a folder of $fpath/_subspace-peft
# tcsh: subspace-peft completion tcsh > a file that ~/.tcshrc sources"""


def add_completion(add: Add) -> None:
    """Add the verb ``completion``."""
    verb = add(
        "completion",
        help="print a script that completes commands in the shell",
        description=(
            "Print a script that completes verbs, options and places in bash, zsh or tcsh. Its first lines say where"
            " it goes; shtab makes it: pip install shtab."
        ),
    )
    verb.add_argument("shell", choices=SHELLS, metavar="SHELL", help=" or ".join(SHELLS))
    verb.set_defaults(run=completion)


def completion(args: Namespace) -> int:
    """Print the script."""
    try:
        import shtab
    except ImportError as error:
        raise SubspaceError(
            "Completion scripts are made by shtab: pip install shtab, or install this package with its extra"
            " `completion`."
        ) from error

    for each in _all(args.top):
        for action in each._actions:
            if action.metavar in FOLDERS:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            elif action.metavar in PLACES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    script = shtab.complete(args.top, args.shell)
    for own, better in BASH if args.shell == "bash" else ():
        script = script.replace(own, better)
    print(script if args.shell == "zsh" else f"{HOW}\n{script}")
    return 0


def _all(parser: ArgumentParser) -> list[Any]:
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                found += _all(verb)
    return found
