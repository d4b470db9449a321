"""``subspace-peft update``, `complete` and `record-base`: a basis's next version, and what it has on record."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._io.progress import begin
from .._lazy import collecting_later
from ..basis.layout import k_range
from ..builders.options import CompleteOptions, Resources, UpdateOptions
from ..energy import percent
from ..errors import SubspaceError
from .common import (
    Add,
    add_base_model,
    add_force,
    add_json,
    add_out,
    base_model,
    earlier_record,
    kept_for_force,
    print_json,
    refuse_idle,
    unfinished,
)
from .flags import add_options, given_options
from .inspecting import inspect
from .merging import check_merging, merge
from .migrating import Carried, add_carrying, say_carried
from .parsers import OUTPUT, TASKS, grouped


def add_update(add: Add) -> None:
    """Add the verb ``update``."""
    verb = add(
        "update",
        help="grow a basis by what new adapters need, with its tasks",
        description=(
            "Make a new version of a basis for further LoRA adapters: old directions stay bit for bit, so tasks lose"
            " nothing, unless -k fits all from scratch. A task on the basis is absorbed: its own directions become"
            " the basis's. Without adapters, -k merges directions into fewer for --tasks, and says first what each"
            " loses. Interrupted, the same command goes on from the modules kept in FOLDER.partial."
        ),
    )
    verb.add_argument("basis", metavar="BASIS", help="folder or Hub id of the basis")
    verb.add_argument(
        "sources", nargs="*", metavar="ADAPTER", help="as for build, or tasks; none: merge directions, -k and --tasks"
    )
    add_options(verb, UpdateOptions)
    add_base_model(verb)
    carried = grouped(verb, TASKS)
    carried.add_argument(
        "--tasks", nargs="+", default=[], metavar="TASK", help="tasks and bundles on the basis to carry over"
    )
    carried.add_argument("--tasks-out", metavar="FOLDER", help="where to write them, each under its own name")
    add_carrying(carried)
    add_out(verb, "where to write the new version", required=True)
    add_force(verb)
    add_json(verb)
    add_options(verb, Resources)
    verb.set_defaults(run=update)


def add_complete(add: Add) -> None:
    """Add the verb ``complete``."""
    verb = add(
        "complete",
        help="fill a basis up to more directions",
        description=(
            "Fill a basis up to k directions with random ones or the base weights' singular vectors. Those that it has"
            " stay bit for bit."
        ),
    )
    verb.add_argument("basis", metavar="BASIS", help="folder or Hub id of the basis")
    add_options(verb, CompleteOptions)
    add_base_model(verb, "model id or folder, for --with base-weights")
    add_out(verb, "where to write the new version", required=True)
    add_force(verb)
    add_json(verb)
    verb.set_defaults(run=complete)


def add_record_base(add: Add) -> None:
    """Add the verb ``record-base``."""
    verb = add(
        "record-base",
        help="record in a basis which weights its base model has",
        description=(
            "Record in a basis's folder which weights its base model has, so that another model is refused wherever"
            " the basis is used. Neither its tensors nor its fingerprint change."
        ),
    )
    verb.add_argument("basis", metavar="BASIS", help="folder of the basis")
    add_base_model(verb, "model id or folder", required=True)
    grouped(verb, OUTPUT).add_argument("--force", action="store_true", help="replace a record of other weights")
    add_json(verb)
    verb.set_defaults(run=record_base)


def update(args: Namespace) -> int:
    """Update a basis: carry all tasks over in memory first, then write."""
    from ..basis import SubspaceBasis
    from ..builders import update_basis
    from ..builders.resume import forget
    from ..report.verdict import verdict_on_record

    with collecting_later():
        from ..convert.migrate import MAX_DRIFT

    if bool(args.tasks) != bool(args.tasks_out):
        raise SubspaceError("Give both, --tasks and --tasks-out: which tasks to carry over, and where to.")
    if not args.sources:
        check_merging(args)
    given = given_options(args, UpdateOptions)
    if not args.tasks and "k" not in given:
        refuse_idle(args, "--max-drift", "without --tasks or -k: a basis that grows keeps all of what it has")
    if not args.tasks:
        refuse_idle(args, "--no-pad", "without --tasks: no task is carried over")
    if "k" in given:
        for flag in ("--add", "--add-in"):
            refuse_idle(args, flag, "with -k, which fits all directions from scratch")
    if "k" not in given:
        given.pop("max_drift", None)  # of the tasks alone: where the basis grows, it keeps all
    bound = MAX_DRIFT if args.max_drift is None else args.max_drift
    if not args.sources:
        given["max_drift"] = bound
    options = UpdateOptions(**given)
    beside = unfinished(args.out) if args.sources else None
    resources = Resources(work_folder=beside, **given_options(args, Resources))
    old = SubspaceBasis.from_pretrained(args.basis)
    tasks = Carried(args.tasks, args.tasks_out, bound, resources.progress, overwrite=args.force, pad=not args.no_pad)
    tasks.check_folders(needed=[args.out])
    inputs = [args.basis, *args.sources, *args.tasks]
    _check_out(args, old, needed=[args.basis] if args.tasks else [], inputs=inputs, options=options)
    if args.sources:
        new = update_basis(
            old,
            args.sources,
            cores=tasks.cores() if options.refit is not None else (),
            base_model=base_model(args.base_model),
            options=options,
            resources=resources,
        )
    else:
        new = merge(old, tasks, options, bound, say=not args.json, verbose=args.verbose)
    begin("carrying tasks over")
    tasks.try_out(new)
    begin("writing the new version")
    with kept_for_force(beside):
        new.save_pretrained(args.out, overwrite=args.force)
    if beside is not None:
        forget(beside)
    facts = {
        "out": str(Path(args.out).resolve()),
        "fingerprint": new.fingerprint,
        "version": new.info["version"],
        "k": new.describe_k(),
        "k_range": k_range(new.shapes()),
        "from": old.fingerprint,
        "skipped": new.info.get("skipped") or [],
        **new.info["update"],
        "tasks": tasks.write(new),
        "verdict": verdict_on_record(new.info, str(args.out), new.shapes()),
    }
    if args.json:
        return print_json(facts)
    if args.sources:
        _say_growth(facts["modules"], args.verbose)
    for entry in facts["skipped"]:
        print(f"  left out: {entry['reason']}")
    print(f"{facts['out']}: version {facts['version']} of the basis, {facts['k']}, fingerprint {facts['fingerprint']}")
    say_carried(facts["tasks"], args.verbose)
    print(*facts["verdict"], sep="\n")
    return 0


def _say_growth(modules: dict[str, Any], verbose: int) -> None:
    """Say how many directions came and what of the new adapters is kept now: of every module, or of the worst."""
    if not verbose and len(modules) > 1:
        sides = [[each["added"][side] for each in modules.values()] for side in (0, 1)]
        more, less = (f"{min(each):+d} to {max(each):+d}" for each in sides)
        print(f"{len(modules)} modules: {more} output and {less} input directions; -v shows each")
        name = min(modules, key=lambda name: modules[name]["kept"])
        modules = {name: modules[name]}
    for name, each in modules.items():
        more, less = (f"{count:+d}" for count in each["added"])
        print(
            f"  {name}: {more} output and {less} input directions; of the new adapters' energy"
            f" {percent(each['kept_before'])} was kept, now {percent(each['kept'])}"
        )


def complete(args: Namespace) -> int:
    """Fill a basis up."""
    from ..basis import SubspaceBasis
    from ..builders import complete_basis

    if args.with_ in (None, "random"):
        refuse_idle(args, "--base-model", "with random directions; --with base-weights takes it")
    else:
        refuse_idle(args, "--seed", "with --with base-weights: those directions are not drawn")
    old = SubspaceBasis.from_pretrained(args.basis)
    _check_out(args, old, inputs=[args.basis])
    new = complete_basis(
        old,
        base_model=base_model(args.base_model),
        progress=not args.quiet,
        **given_options(args, CompleteOptions),
    )
    new.save_pretrained(args.out, overwrite=args.force)
    return inspect(Namespace(path=args.out, no_verify=True, json=args.json, verbose=args.verbose))


def record_base(args: Namespace) -> int:
    """Record a basis's base weights."""
    with collecting_later():
        from ..tuner.base_record import record_base_model

    record_base_model(args.basis, base_model(args.base_model), overwrite=args.force)
    return inspect(Namespace(path=args.basis, no_verify=True, json=args.json, verbose=args.verbose))


def _check_out(
    args: Namespace, old: Any, *, inputs: list[str], needed: Sequence[str] = (), options: UpdateOptions | None = None
) -> None:
    """Raise where the new version may not be written into ``--out``, before it is made."""
    from .._io.occupied import BASIS
    from ..basis.overwriting import Planned, check_target

    # the same call's earlier result may lie there; whether it is that shows when the new version is written
    earlier = earlier_record(args.out)
    again = [each.get("fingerprint") for each in earlier.get("lineage") or []][-1:] == [old.fingerprint]
    if again and options is not None:
        record = (earlier.get("update") or {}).get("arguments") or {}
        wanted = json.loads(json.dumps(options.record(0), default=str))
        again = all(record.get(name) == value for name, value in wanted.items() if name != "tasks")
    planned = Planned(BASIS, certain=not again)
    check_target(args.out, planned, overwrite=args.force, inputs=inputs, needed=needed)
