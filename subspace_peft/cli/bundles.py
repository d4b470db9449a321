"""``subspace-peft bundle …``: its verbs. Imports happen inside."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from .._io.text import read_text
from .._lazy import collecting_later
from .._shown import said_of_directions
from ..energy import percent
from ..errors import SubspaceError
from .common import DTYPES, Add, add_basis, add_force, add_json, add_out, print_json, refuse_idle
from .parsers import OUTPUT, RUNS, SOURCES, STORED, adder, grouped


def add_bundle(add: Add) -> None:
    """Add the verb ``bundle`` with its own verbs."""
    top = add(
        "bundle",
        help="pack tasks into one file; list, add, extract",
        description=(
            "Pack many tasks on one basis into one file, from which each is read without the rest. List what is in a"
            " bundle, add to it, or write its tasks as adapter folders."
        ),
    )
    _, verb = adder(top, "what", "VERB")

    make = verb(
        "create",
        help="pack saved tasks into a bundle",
        description="Pack saved tasks of one basis into a bundle. Each keeps its name, its labels and its head.",
    )
    _add_packed(make)
    grouped(make, STORED).add_argument("--dtype", default="float32", choices=DTYPES, help="of the stored cores")
    add_out(make, "the bundle's folder", required=True)
    add_force(make)
    make.set_defaults(run=create)

    more = verb(
        "add",
        help="add saved tasks to a bundle",
        description="Add saved tasks to a bundle. What is in it stays as it is.",
    )
    more.add_argument("bundle", metavar="BUNDLE", help="its folder")
    _add_packed(more)
    grouped(more, OUTPUT).add_argument("--replace", action="store_true", help="replace tasks of the same names")
    more.set_defaults(run=add_to)

    show = verb(
        "ls",
        help="list the tasks of a bundle",
        description="List the tasks of a bundle with sizes, scores and classes. On the Hub only the index is read.",
    )
    show.add_argument("bundle", metavar="BUNDLE", help="folder or Hub id")
    grouped(show, RUNS).add_argument(
        "--verify", action="store_true", help="read every task and hold it against its hash"
    )
    show.set_defaults(run=ls)

    out = verb(
        "extract",
        help="write tasks of a bundle as adapter folders",
        description=(
            "Write tasks of a bundle as adapter folders, subspace tasks or stock LoRAs. Each becomes a folder of its"
            " name in --out."
        ),
    )
    out.add_argument("bundle", metavar="BUNDLE", help="folder or Hub id")
    out.add_argument("tasks", nargs="*", metavar="NAME", help="names in the bundle; all with --all")
    sources = grouped(out, SOURCES)
    sources.add_argument("--all", action="store_true", help="every task")
    add_basis(out, "where the basis is, if not where the bundle says")
    form = grouped(out, OUTPUT).add_mutually_exclusive_group()
    form.add_argument("--as-lora", action="store_true", help="as stock LoRAs, own directions and all")
    form.add_argument(
        "--no-own-directions",
        "--no-residual",
        action="store_true",
        help="as subspace tasks, without what they have beside the basis",
    )
    add_out(out, "each task becomes a folder of its name in there", required=True)
    add_force(out)
    out.set_defaults(run=extract)

    for each in (show, out):
        grouped(each, SOURCES).add_argument("--revision", help="branch, tag or commit on the Hub")
    for each in (make, more, show, out):
        add_json(each)


def _add_packed(verb: ArgumentParser) -> None:
    """Add which tasks are packed, where their basis is, and what the index says of them beside."""
    verb.add_argument("tasks", nargs="+", metavar="TASK", help="folder of a task, or Hub id with @revision")
    add_basis(verb, "where the basis is, if not where the tasks say")
    grouped(verb, STORED).add_argument(
        "--facts", metavar="FILE", help='JSON: {"name": {"metrics": {…}, "id2label": {…}}} for the index'
    )


def create(args: Namespace) -> int:
    """Pack saved tasks into a bundle."""
    with collecting_later():
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
    return _list(found, args, found.verify(progress=not args.quiet) if args.verify else None)


def extract(args: Namespace) -> int:
    """Write tasks of a bundle as adapter folders."""
    from ..bundle import extract_tasks

    if not args.tasks and not args.all:
        raise SubspaceError("name the tasks, or pass --all. `subspace-peft bundle ls` lists them.")
    if args.tasks and args.all:
        raise SubspaceError(f"give names, as {args.tasks[0]!r}, or --all, not both.")
    _check_revision(args)
    folders = extract_tasks(
        args.bundle,
        args.out,
        None if args.all else args.tasks,
        as_lora=args.as_lora or None,
        own_directions=False if args.no_own_directions else None,
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


def _check_revision(args: Namespace) -> None:
    if Path(args.bundle).expanduser().exists():
        refuse_idle(args, "--revision", f"on {args.bundle}, which is on this machine and taken as it is")


def _list(found: Any, args: Namespace, wrong: dict[str, str] | None = None) -> int:
    from dataclasses import asdict

    if args.json:
        # `residual_rank` is the earlier name of `extra_rank`
        tasks = {
            name: {
                **asdict(task),
                "residual_rank": task.extra_rank,
                "own_directions": sum(found.own_directions(name).values()),
                "problem": (wrong or {}).get(name),
            }
            for name, task in found.items()
        }
        print_json(
            {"location": found.location, "revision": found.revision, "fingerprint": found.fingerprint, "tasks": tasks}
        )
        return 1 if wrong else 0
    config = found.index["config"]
    at = f"@{found.revision[:12]}" if found.revision else ""
    base = found.base_model or "a base model that is not named"
    print(f"{found.location}{at}: {len(found)} tasks for {base}, {found.store.size:,} bytes")
    print(f"basis {config.get('basis')}, fingerprint {found.fingerprint}")
    for name in found:
        task = found[name]
        facts = [f"{task.bytes:,} bytes"]
        facts += [f"{key} {value}" for key, value in task.metrics.items()]
        if task.energy_kept is not None:
            facts.append(f"energy kept {percent(task.energy_kept)}")
        if task.extra_rank:
            facts.append(f"own directions {said_of_directions(found.own_directions(name))}")
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
