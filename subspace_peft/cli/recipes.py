"""``subspace-peft demo``, `cp` and `run`: recipes, and stock scripts with the plugin. Imports happen inside."""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace

from .common import Add, add_json, add_quiet, print_json, print_table, refuse_idle


def add_demo(add: Add) -> None:
    """Add the verb ``demo``."""
    verb = add(
        "demo",
        help="the whole path on real data, in minutes",
        description=(
            "Train a fleet on real text tasks, build its basis, train held-out tasks in it beside their controls."
        ),
    )
    verb.add_argument("--out", default="demo-output", metavar="FOLDER")
    verb.add_argument(
        "--stage", choices=("sources", "all"), default="all", help="sources: model, data and adapters only"
    )
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--quick", action="store_true", help="a minute's version, whose scores mean nothing")
    add_json(verb)
    add_quiet(verb)
    verb.set_defaults(run=demo)


def add_copy(add: Add) -> None:
    """Add the verb ``cp``."""
    verb = add(
        "cp",
        help="copy a recipe out to edit",
        description="Copy a recipe out to edit; without a name, list them.",
    )
    verb.add_argument("recipe", nargs="?", help="glue, image_classification, mistral …")
    verb.add_argument("--out", default=".", metavar="PLACE", help="a folder, or a file's name ending in .py")
    verb.add_argument("--force", action="store_true", help="overwrite a file that is there")
    add_json(verb)
    verb.set_defaults(run=copy)


def add_run(add: Add) -> None:
    """Add the verb ``run``."""
    verb = add(
        "run",
        help="run a stock script with the plugin imported",
        description="Import subspace_peft, then run a script (or -m module) unchanged.",
    )
    verb.add_argument(
        "script", nargs=argparse.REMAINDER, metavar="SCRIPT …", help="script.py or -m module, and arguments"
    )
    verb.set_defaults(run=run)


def demo(args: Namespace) -> int:
    """Go the whole path on real data."""
    from ..recipes import load_recipe

    results = load_recipe("demo").run_demo(
        args.out, stage=args.stage, seed=args.seed, quick=args.quick, progress=not args.quiet
    )
    return print_json(results) if args.json else 0


def copy(args: Namespace) -> int:
    """Copy a recipe out, or list all."""
    from ..recipes import copy_recipe, list_recipes, recipe_files

    if args.recipe is None:
        refuse_idle(args, "--force", "without a recipe: all are listed, and none is copied")
        known = list_recipes()
        if args.json:
            return print_json(known)
        print_table(known)
        return 0
    file = copy_recipe(args.recipe, args.out, force=args.force)
    beside = [file.parent / each for each in recipe_files(args.recipe)[1:]]
    if args.json:
        return print_json({"file": str(file), "beside": [str(each) for each in beside]})
    print(file)
    for folder in sorted({each.parent for each in beside}):
        count = sum(each.parent == folder for each in beside)
        print(f"{folder}: {count} files that it imports", file=sys.stderr)
    return 0


def run(args: Namespace) -> int:
    """Run a stock script with the plugin imported."""
    from ..run import run_script

    run_script(args.script)
    return 0
