"""``subspace-peft bundle …`` and `compress`: their arguments and output. Imports happen inside."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from .._io.text import read_text
from ..builders.option_checks import number
from ..energy import percent
from ..errors import SubspaceError
from .common import (
    Add,
    add_base_model_name,
    add_force,
    add_json,
    add_quiet,
    add_reading,
    base_model,
    print_json,
    refuse_idle,
    said_of_conversion,
)

DTYPES = ["float32", "bfloat16", "float16", "float64"]


def add_bundle(add: Add) -> None:
    """Add the verb ``bundle`` with its own verbs."""
    top = add("bundle", help="pack tasks into one file", description="Pack tasks into one file; list, add, extract.")
    verb = top.add_subparsers(dest="what", metavar="WHAT", required=True).add_parser

    make = verb("create", help="pack saved tasks into a bundle")
    make.add_argument("tasks", nargs="+", metavar="TASK", help="folder of a task, or Hub id with @revision")
    make.add_argument("--out", required=True, metavar="FOLDER", help="the bundle's folder")
    make.add_argument("--dtype", default="float32", choices=DTYPES, help="of the stored cores")
    add_force(make)
    make.set_defaults(run=create)

    more = verb("add", help="add saved tasks to a bundle; what is in it stays as it is")
    more.add_argument("bundle", help="its folder")
    more.add_argument("tasks", nargs="+", metavar="TASK", help="folder of a task, or Hub id with @revision")
    more.add_argument("--replace", action="store_true", help="replace tasks of the same names")
    more.set_defaults(run=add_to)
    for each in (make, more):
        each.add_argument("--basis", help="where the basis is, if not where the tasks say")
        each.add_argument(
            "--facts", metavar="FILE", help='JSON: {"name": {"metrics": {…}, "id2label": {…}}} for the index'
        )

    show = verb("ls", help="list the tasks of a bundle")
    show.add_argument("bundle", help="folder or Hub id")
    show.add_argument("--verify", action="store_true", help="read every task and hold it against its hash")
    show.set_defaults(run=ls)

    out = verb("extract", help="write tasks of a bundle as adapter folders")
    out.add_argument("bundle", help="folder or Hub id")
    out.add_argument("tasks", nargs="*", metavar="NAME", help="names in the bundle; all with --all")
    out.add_argument("--all", action="store_true", help="every task")
    out.add_argument("--out", required=True, metavar="FOLDER", help="each becomes a folder of its name in there")
    form = out.add_mutually_exclusive_group()
    form.add_argument("--as-lora", action="store_true", help="as stock LoRAs, residuals and all")
    form.add_argument("--no-residual", action="store_true", help="as subspace tasks, without their residuals")
    out.add_argument("--basis", help="where the basis is, if not where the bundle says")
    add_force(out)
    out.set_defaults(run=extract)

    for each in (show, out):
        each.add_argument("--revision", help="branch, tag or commit on the Hub")
    for each in (make, more, show, out):
        add_json(each)
    for each in (make, more, out):
        add_quiet(each)


def add_compress(add: Add) -> None:
    """Add the verb ``compress``."""
    verb = add(
        "compress",
        help="turn a fleet of LoRAs into a bundle",
        description="Project LoRAs on a basis and pack them into one bundle; say what is kept, lost and saved.",
    )
    verb.add_argument("loras", nargs="+", metavar="LORA", help="LoRA folder, or Hub id with @revision")
    verb.add_argument("--basis", required=True, help="folder or Hub id of the basis")
    verb.add_argument("--out", required=True, metavar="FOLDER", help="the bundle's folder")
    verb.add_argument(
        "--min-energy",
        default="0.5",
        metavar="SHARE",
        help="refuse an adapter of which less than this is kept, residual and all (default: %(default)s)",
    )
    verb.add_argument(
        "--residual",
        type=int,
        default=0,
        metavar="RANK",
        help="below the threshold, keep a residual of up to this rank (1 to 4 are usual)",
    )
    verb.add_argument("--skip-bad", action="store_true", help="leave refused adapters out, each with its reason")
    verb.add_argument("--no-base-check", action="store_true", help="accept another base model's name")
    add_base_model_name(verb)
    verb.add_argument("--dtype", default="float32", choices=DTYPES, help="of stored parameters")
    add_force(verb)
    add_reading(verb)
    add_json(verb)
    add_quiet(verb)
    verb.set_defaults(run=compress)


def create(args: Namespace) -> int:
    """Pack saved tasks into a bundle."""
    import torch

    from ..bundle import bundle_tasks

    dtype = getattr(torch, args.dtype)
    made = bundle_tasks(
        args.tasks,
        args.out,
        basis=args.basis,
        dtype=dtype,
        overwrite=args.force,
        progress=not args.quiet,
        **_facts(args.facts),
    )
    return _list(made, args)


def add_to(args: Namespace) -> int:
    """Add saved tasks to a bundle."""
    from ..bundle import add_tasks

    made = add_tasks(
        args.bundle, args.tasks, replace=args.replace, basis=args.basis, progress=not args.quiet, **_facts(args.facts)
    )
    return _list(made, args)


def ls(args: Namespace) -> int:
    """List the tasks of a bundle."""
    from ..bundle.index import open_index

    _check_revision(args)
    found = open_index(args.bundle, revision=args.revision)
    return _list(found, args, found.verify() if args.verify else None)


def extract(args: Namespace) -> int:
    """Write tasks of a bundle as adapter folders."""
    from ..bundle import extract_tasks

    if not args.tasks and not args.all:
        raise SubspaceError("bundle extract: name the tasks, or pass --all. `subspace-peft bundle ls` lists them.")
    if args.tasks and args.all:
        raise SubspaceError(f"bundle extract: give names, as {args.tasks[0]!r}, or --all, not both.")
    _check_revision(args)
    as_lora = True if args.as_lora else False if args.no_residual else None
    folders = extract_tasks(
        args.bundle,
        args.out,
        None if args.all else args.tasks,
        as_lora=as_lora,
        basis=args.basis,
        overwrite=args.force,
        revision=args.revision,
        progress=not args.quiet,
    )
    if args.json:
        return print_json({folder.name: str(folder) for folder in folders})
    for folder in folders:
        print(folder)
    return 0


def compress(args: Namespace) -> int:
    """Turn a fleet of LoRAs into a bundle."""
    import torch

    from ..bundle import compress_fleet

    report = compress_fleet(
        args.loras,
        args.basis,
        args.out,
        min_energy=number(args.min_energy),
        residual=args.residual,
        skip_bad=args.skip_bad,
        check_base_model=not args.no_base_check,
        base_model_name=args.base_model_name,
        dtype=getattr(torch, args.dtype),
        overwrite=args.force,
        progress=not args.quiet,
        allow_bin=args.allow_bin,
        base_model=base_model(args.base_model),
    )
    if args.json:
        return print_json(report.to_dict())
    for each in report.adapters:
        if each.refused or each.total is None:
            print(f"{each.location}: left out: {each.refused}")
            continue
        rank = f" in a residual of rank {each.residual_rank}" if each.residual_rank else ""
        alone = ", the projection alone" if each.residual_rank else ""
        how = said_of_conversion(each.converted_from, each.lost_in_conversion)
        print(
            f"{each.name}: energy kept {percent(each.total.kept)}, residual {percent(each.total.residual)}{rank}, lost"
            f" {percent(each.total.lost)} ({each.verdict}{alone}){how}"
        )
        for module, share in each.modules.items():
            print(f"  {percent(share.kept):>7}  {percent(share.residual):>7}  {percent(share.lost):>7}  {module}")
    print(storage_table(report.storage))
    return 0


def storage_table(storage: Any) -> str:
    """Return the storage report in a few lines."""
    even = "never" if storage.break_even is None else f"from {storage.break_even:,} adapters on"
    rows = [
        (f"{storage.adapters:,} adapters before", storage.before),
        ("basis", storage.basis),
        ("bundle", storage.bundle),
        ("basis and bundle", storage.after),
        ("an adapter before", round(storage.per_adapter_before)),
        ("an adapter in the bundle", round(storage.per_adapter_after)),
    ]
    lines = [f"{title:<28}{size:>16,} bytes" for title, size in rows]
    return "\n".join([*lines, f"{'the basis is paid for':<28}{even}"])


def _check_revision(args: Namespace) -> None:
    if Path(args.bundle).expanduser().exists():
        refuse_idle(args, "--revision", f"on {args.bundle}, which is on this machine and taken as it is")


def _list(found: Any, args: Namespace, wrong: dict[str, str] | None = None) -> int:
    from dataclasses import asdict

    if args.json:
        tasks = {name: {**asdict(found[name]), "problem": (wrong or {}).get(name)} for name in found}
        print_json(
            {"location": found.location, "revision": found.revision, "fingerprint": found.fingerprint, "tasks": tasks}
        )
        return 1 if wrong else 0
    config = found.index["config"]
    at = f"@{found.revision[:12]}" if found.revision else ""
    print(f"{found.location}{at}: {len(found)} tasks for {found.base_model}, {found.store.size:,} bytes")
    print(f"basis {config.get('basis')}, fingerprint {found.fingerprint}")
    for name in found:
        task = found[name]
        facts = [f"{task.bytes:,} bytes"]
        facts += [f"{key} {value}" for key, value in task.metrics.items()]
        if task.energy_kept is not None:
            facts.append(f"energy kept {percent(task.energy_kept)}")
        if task.residual_rank:
            facts.append(f"residual of rank {task.residual_rank}")
        if task.modules_to_save:
            facts.append(f"with {', '.join(sorted(set(task.modules_to_save)))}")
        if task.id2label:
            facts.append(f"classes {', '.join(task.id2label.values())}")
        state = "" if wrong is None else f"{wrong.get(name) or 'intact'}: "
        print(f"  {state}{name}: {', '.join(facts)}")
    return 1 if wrong else 0


def _facts(file: str | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        given = json.loads(read_text(Path(file)))
        return {
            key: {name: facts[key] for name, facts in given.items() if key in facts} for key in ("metrics", "id2label")
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise SubspaceError(
            f'{file}: give a JSON file like {{"name": {{"metrics": {{…}}, "id2label": {{…}}}}}} ({error}).'
        ) from error
