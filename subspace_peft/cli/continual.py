"""``subspace-peft continual run``, `status` and `resume`: task after task on one basis. Imports happen inside."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from ..errors import SubspaceError
from .common import Add, add_json, add_out, print_json
from .parsers import OUTPUT, RUNS, adder, grouped


def add_continual(add: Add) -> None:
    """Add the verb ``continual`` with its own verbs."""
    top = add(
        "continual",
        help="learn task after task, and forget none",
        description=(
            "Learn tasks one after another on one basis, which grows by what they bring. Unless the basis is refitted"
            " within a fixed size, earlier tasks answer as before to the bit; what that costs in bytes is said."
        ),
    )
    _, verb = adder(top, "what", "VERB")
    run = verb(
        "run",
        help="learn the tasks of a plan",
        description=(
            "Learn the tasks of a plan in their order: a YAML file with `base_model:`, `basis:` or `loras:`, and"
            " `tasks:`. Interrupted anywhere, the same command goes on from there, to the same bytes; tasks may be"
            " added at the end of the plan later."
        ),
    )
    run.add_argument("plan", metavar="PLAN", help="YAML or JSON file")
    add_out(run, "the run's folder, if not the plan's `out:`")
    status = verb(
        "status",
        help="say how far a run is, and what it costs",
        description=(
            "Print the matrix of scores with ACC, BWT, forgetting and FWT, the growth of the basis, and its bytes"
            " beside a LoRA for each task. Nothing is loaded for it but the run's journal."
        ),
    )
    output = grouped(status, OUTPUT)
    output.add_argument("--markdown", action="store_true", help="print tables of Markdown")
    output.add_argument("--figure", metavar="FILE", help="draw scores, growth and bytes into a PNG as well")
    resume = verb(
        "resume",
        help="go on with a run that was interrupted",
        description=(
            "Go on with a run of a plan from its folder, which has kept the plan. A training goes on from its newest"
            " checkpoint; the files at the end are those of a run that was not interrupted."
        ),
    )
    for each in (status, resume):
        each.add_argument("folder", metavar="FOLDER", help="the run's folder")
    for each in (run, resume):
        grouped(each, RUNS).add_argument(
            "--restart",
            action="store_true",
            help="begin the unfinished task again, as the plan has it now, or give it up",
        )
    for each in (run, status, resume):
        add_json(each)
        each.set_defaults(run=continual)


def continual(args: Namespace) -> int:
    """Run, show or go on with a run."""
    status = {"run": _run, "status": _status, "resume": _resume}[args.what](args)
    figure = getattr(args, "figure", None)
    drawn = None if figure is None else str(status.figure(Path(figure).expanduser()))
    if args.json:
        return print_json({**status.to_dict(), **({} if drawn is None else {"figure": drawn})})
    print(status.text(markdown=getattr(args, "markdown", False)))
    if drawn is not None:
        print(drawn)
    return 0


def _run(args: Namespace) -> Any:
    from ..continual.plan import read_plan

    plan = read_plan(args.plan)
    out = args.out or plan.out
    if out is None:
        raise SubspaceError(f"Give the run's folder: `out:` in {args.plan}, or --out.")
    return _learn(plan, out, args)


def _resume(args: Namespace) -> Any:
    from ..continual.plan import read_kept_plan

    return _learn(read_kept_plan(args.folder), args.folder, args)


def _learn(plan: Any, folder: str, args: Namespace) -> Any:
    from contextlib import nullcontext, redirect_stdout
    from sys import stderr

    from .._lazy import collecting_later

    with collecting_later():
        from ..continual.run_plan import run_plan
    # what the Trainer prints on its way goes beside the result, not before it
    with redirect_stdout(stderr) if args.json else nullcontext():
        return run_plan(plan, folder, restart=args.restart, progress=not args.quiet)


def _status(args: Namespace) -> Any:
    from ..continual.status import read_status

    return read_status(args.folder)
