"""``subspace-peft demo``, `cp` and `run`: recipes, and stock scripts with the plugin. Imports happen inside."""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from contextlib import nullcontext, redirect_stdout

from .common import Add, add_json, add_out, print_json, print_table, refuse_idle
from .parsers import OUTPUT, RUNS, grouped


def add_demo(add: Add) -> None:
    """Add the verb ``demo``."""
    verb = add(
        "demo",
        help="the whole path on real data, in minutes",
        description=(
            "Train a fleet on real text tasks, build its basis, and train held-out tasks in it beside their controls."
            " Takes about ten minutes on two cores, and prints a table for each task."
        ),
    )
    add_out(verb, "where to write everything (default: %(default)s)", default="demo-output")
    add_json(verb)
    grouped(verb, RUNS).add_argument(
        "--stage", choices=("sources", "all"), default="all", help="sources: model, data and adapters only"
    )
    grouped(verb, RUNS).add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random")
    grouped(verb, RUNS).add_argument(
        "--quick", action="store_true", help="a minute's version, whose scores mean nothing"
    )
    verb.set_defaults(run=demo)


def add_copy(add: Add) -> None:
    """Add the verb ``cp``."""
    verb = add(
        "cp",
        help="copy a recipe out to edit",
        description="Copy a recipe, a script that trains and measures, out to edit. Without a name, list them.",
    )
    verb.add_argument("recipe", nargs="?", metavar="RECIPE", help="glue, image_classification, mistral …")
    output = grouped(verb, OUTPUT)
    output.add_argument("--out", default=".", metavar="PLACE", help="a folder, or a file's name ending in .py")
    output.add_argument("--force", action="store_true", help="overwrite a file that is there")
    add_json(verb)
    verb.set_defaults(run=copy)


def add_run(add: Add) -> None:
    """Add the verb ``run``."""
    verb = add(
        "run",
        help="run a stock script with the plugin imported",
        description=(
            "Import subspace_peft, so that PEFT knows its tasks, then run a script (or -m module) unchanged. All that"
            " follows is the script's."
        ),
    )
    verb.add_argument(
        "script", nargs=argparse.REMAINDER, metavar="SCRIPT …", help="script.py or -m module, and arguments"
    )
    verb.set_defaults(run=run)


def demo(args: Namespace) -> int:
    """Go the whole path on real data."""
    from ..recipes import load_recipe

    # what it says on its way goes beside the JSON, not before it
    with redirect_stdout(sys.stderr) if args.json else nullcontext():
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
