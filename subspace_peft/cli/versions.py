"""``subspace-peft update``, `complete` and `migrate`: a basis's next version, and its tasks."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..builders.options import CompleteOptions, Resources, UpdateOptions
from ..energy import percent
from ..errors import SubspaceError
from .common import (
    BASE_MODEL_HELP,
    Add,
    add_force,
    add_json,
    add_quiet,
    base_model,
    earlier_record,
    kept_for_force,
    print_json,
    refuse_idle,
    unfinished,
)
from .flags import add_options, given_options
from .inspecting import inspect


def add_update(add: Add) -> None:
    """Add the verb ``update``."""
    verb = add(
        "update",
        help="grow a basis by what new adapters need, and carry its tasks over",
        description=(
            "A new version of a basis for further LoRA adapters. Old directions stay bit for bit, so tasks lose"
            " nothing; -k fits all directions from scratch instead. Interrupted, the same command goes on from the"
            " modules kept in FOLDER.partial."
        ),
    )
    verb.add_argument("basis", help="folder or Hub id of the basis")
    verb.add_argument("sources", nargs="+", metavar="ADAPTER", help="as for build")
    verb.add_argument("--out", required=True, metavar="FOLDER", help="where to write the new version")
    add_force(verb)
    add_options(verb, UpdateOptions)
    verb.add_argument("--base-model", help=BASE_MODEL_HELP)
    verb.add_argument(
        "--tasks", nargs="+", default=[], metavar="TASK", help="tasks and bundles on the basis to carry over"
    )
    verb.add_argument("--tasks-out", metavar="FOLDER", help="where to write them, each under its own name")
    _add_drift(verb)
    add_options(verb, Resources)
    add_json(verb)
    verb.set_defaults(run=update)


def add_migrate(add: Add) -> None:
    """Add the verb ``migrate``."""
    verb = add(
        "migrate",
        help="carry tasks over to another version of their basis",
        description=(
            "Carry tasks and bundles over to another basis, and say how much of their updates' norm that changes."
        ),
    )
    verb.add_argument("tasks", nargs="+", metavar="TASK", help="folder or Hub id of a task, or a bundle's folder")
    verb.add_argument("--basis", required=True, help="folder or Hub id of the basis to carry them to")
    verb.add_argument("--out", required=True, metavar="FOLDER", help="where to write them, each under its own name")
    add_force(verb)
    verb.add_argument("--old-basis", help="where their own basis is, if not where they say")
    _add_drift(verb)
    add_json(verb)
    add_quiet(verb)
    verb.set_defaults(run=migrate)


def add_complete(add: Add) -> None:
    """Add the verb ``complete``."""
    verb = add(
        "complete",
        help="fill a basis up to more directions",
        description=(
            "Fill a basis up to k directions with random ones or the base weights' singular vectors. Those it has stay"
            " bit for bit."
        ),
    )
    verb.add_argument("basis", help="folder or Hub id of the basis")
    verb.add_argument("--out", required=True, metavar="FOLDER", help="where to write the new version")
    add_force(verb)
    add_options(verb, CompleteOptions)
    verb.add_argument("--base-model", help="model id or folder, for base-weights")
    add_json(verb)
    add_quiet(verb)
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
    verb.add_argument("basis", help="folder of the basis")
    verb.add_argument("--base-model", required=True, help="model id or folder")
    verb.add_argument("--force", action="store_true", help="replace a record of other weights")
    add_json(verb)
    verb.set_defaults(run=record_base)


def _add_drift(verb: ArgumentParser) -> None:
    verb.add_argument(
        "--max-drift",
        type=float,
        metavar="SHARE",
        help="refuse where more than this share of an update's norm changes in a module (default: rounding only)",
    )


def update(args: Namespace) -> int:
    """Update a basis: carry all tasks over in memory first, then write."""
    from ..basis import SubspaceBasis
    from ..builders import update_basis
    from ..builders.resume import forget
    from ..convert.migrate import MAX_DRIFT
    from ..report.verdict import verdict_on_record

    if bool(args.tasks) != bool(args.tasks_out):
        raise SubspaceError("Give both, --tasks and --tasks-out: which tasks to carry over, and where to.")
    given = given_options(args, UpdateOptions)
    if not args.tasks and "k" not in given:
        refuse_idle(args, "--max-drift", "without --tasks or -k: a basis that grows keeps all of what it has")
    if "k" in given:
        for flag in ("--add", "--add-in"):
            refuse_idle(args, flag, "with -k, which fits all directions from scratch")
    if "k" not in given:
        given.pop("max_drift", None)  # of the tasks alone: where the basis grows, it keeps all
    options = UpdateOptions(**given)
    beside = unfinished(args.out)
    resources = Resources(work_folder=beside, **given_options(args, Resources))
    old = SubspaceBasis.from_pretrained(args.basis)
    bound = MAX_DRIFT if args.max_drift is None else args.max_drift
    tasks = _Tasks(args.tasks, args.tasks_out, bound, resources.progress, overwrite=args.force)
    tasks.check_folders(needed=[args.out])
    inputs = [args.basis, *args.sources, *args.tasks]
    _check_out(args, old, needed=[args.basis] if args.tasks else [], inputs=inputs, options=options)
    new = update_basis(
        old,
        args.sources,
        cores=tasks.cores() if options.refit is not None else (),
        base_model=base_model(args.base_model),
        options=options,
        resources=resources,
    )
    tasks.try_out(new)
    with kept_for_force(beside):
        new.save_pretrained(args.out, overwrite=args.force)
    if beside is not None:
        forget(beside)
    facts = {
        "out": str(Path(args.out).resolve()),
        "fingerprint": new.fingerprint,
        "version": new.info["version"],
        "k": new.describe_k(),
        "from": old.fingerprint,
        "skipped": new.info["skipped"],
        **new.info["update"],
        "tasks": tasks.write(new),
        "verdict": verdict_on_record(new.info, str(args.out)),
    }
    if args.json:
        return print_json(facts)
    for name, each in facts["modules"].items():
        more, less = each["added"]
        print(
            f"  {name}: {more:+d} output and {less:+d} input directions; of the new adapters' energy"
            f" {percent(each['kept_before'])} was kept, now {percent(each['kept'])}"
        )
    for entry in facts["skipped"]:
        print(f"  left out: {entry['reason']}")
    print(f"{facts['out']}: version {facts['version']} of the basis, {facts['k']}, fingerprint {facts['fingerprint']}")
    _say(facts["tasks"])
    print(*facts["verdict"], sep="\n")
    return 0


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
    return inspect(Namespace(path=args.out, no_verify=True, json=args.json))


def record_base(args: Namespace) -> int:
    """Record a basis's base weights."""
    from ..tuner.base_record import record_base_model

    record_base_model(args.basis, base_model(args.base_model), overwrite=args.force)
    return inspect(Namespace(path=args.basis, no_verify=True, json=args.json))


def migrate(args: Namespace) -> int:
    """Carry tasks over; all of them or none."""
    from ..basis import SubspaceBasis
    from ..convert.migrate import MAX_DRIFT

    bound = MAX_DRIFT if args.max_drift is None else args.max_drift
    tasks = _Tasks(args.tasks, args.out, bound, not args.quiet, args.old_basis, args.force)
    new = SubspaceBasis.from_pretrained(args.basis)
    tasks.check_folders(new.fingerprint, needed=[args.basis, args.old_basis])
    tasks.try_out(new)
    facts = tasks.write(new)
    return print_json({"fingerprint": new.fingerprint, "tasks": facts}) if args.json else _say(facts)


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


def _say(tasks: list[dict[str, Any]]) -> int:
    for each in tasks:
        worst = max(each["drift_per_module"], key=each["drift_per_module"].__getitem__)
        converted = f", {each['converted_from']} coefficients became core" if each.get("converted_from") else ""
        print(
            f"  {each['out']}: drift {each['drift']:.1e}, at most {each['drift_per_module'][worst]:.1e}"
            f" ({worst}){converted}"
        )
    return 0


class _Tasks:
    """Tasks and bundles on their way to another basis: tried first, written when all of them can be."""

    def __init__(
        self,
        references: list[str],
        out: str | None,
        max_drift: float,
        progress: bool,
        old_basis: str | None = None,
        overwrite: bool = False,
    ) -> None:
        from ..bundle.format import BUNDLE_FILE
        from ..hub import split_revision

        self.out, self.max_drift, self.progress, self.old_basis = Path(out or "."), max_drift, progress, old_basis
        self.overwrite = overwrite
        self.bundles: dict[str, str] = {}
        self.tasks: dict[str, tuple[str, dict[str, str]]] = {}
        self.done: dict[str, Any] = {}
        for reference in references:
            folder = Path(reference).expanduser()
            repo, revision = (str(folder), None) if folder.is_dir() else split_revision(reference)
            name = Path(folder.resolve() if folder.is_dir() else repo).name
            if name in self.tasks or name in self.bundles:
                raise SubspaceError(
                    f"Two of the tasks are called {name!r}, and would be written to one folder. Carry them over apart."
                )
            if (folder / BUNDLE_FILE).is_file():
                self.bundles[name] = str(folder)
            else:
                self.tasks[name] = (repo, {} if revision is None else {"revision": revision})

    def check_folders(self, fingerprint: str | None = None, needed: Sequence[str | None] = ()) -> None:
        """Raise where a folder to be written holds something else; all are checked before the long work.

        Args:
            fingerprint: of the basis that the tasks are carried to; None while that is to be made.
            needed: places that are still read, or that the tasks will refer to.
        """
        from .._io.folder_names import check_folder_names
        from .._io.occupied import BUNDLE, TASK
        from ..basis.overwriting import Planned, check_target

        check_folder_names(self.out, [*self.tasks, *self.bundles])
        certain = fingerprint is not None
        for name, (repo, _) in self.tasks.items():
            planned = Planned(TASK, fingerprint, certain=certain)
            check_target(self.out / name, planned, overwrite=self.overwrite, inputs=[repo], needed=needed)
        for name, folder in self.bundles.items():
            planned = Planned(BUNDLE, fingerprint, certain=certain)
            check_target(self.out / name, planned, overwrite=self.overwrite, needed=[folder, *needed])

    def cores(self) -> list[dict[str, Any]]:
        """Return the cores of all tasks, in units of ΔW."""
        from ..bundle import open_bundle
        from ..tasks import read_task

        found = [read_task(repo, basis=self.old_basis, **hub).cores for repo, hub in self.tasks.values()]
        for folder in self.bundles.values():
            bundle = open_bundle(folder)
            found += [bundle.read(name).cores for name in bundle]
        return found

    def try_out(self, basis: Any) -> None:
        """Carry the tasks over, in memory; raises before anything is written."""
        from ..bundle.migrate import bundle_drifts
        from ..convert import migrate_task

        for folder in self.bundles.values():
            bundle_drifts(folder, basis, max_drift=self.max_drift, old_basis=self.old_basis, progress=self.progress)
        for name, (repo, hub) in self.tasks.items():
            self.done[name] = migrate_task(repo, basis, max_drift=self.max_drift, old_basis=self.old_basis, **hub)

    def write(self, basis: Any) -> list[dict[str, Any]]:
        """Write all of them; returns the facts that `--json` prints of each."""
        from ..bundle import migrate_bundle

        facts = []
        for name, found in self.done.items():
            facts.append(
                {"out": str(found.save_pretrained(self.out / name, overwrite=self.overwrite)), **found.to_dict()}
            )
        for name, folder in self.bundles.items():
            _, drifts = migrate_bundle(
                folder,
                basis,
                self.out / name,
                max_drift=self.max_drift,
                old_basis=self.old_basis,
                overwrite=self.overwrite,
                progress=self.progress,
            )
            worst: dict[str, float] = {}
            for each in drifts.values():
                for module, drift in each.items():
                    worst[module] = max(drift, worst.get(module, 0.0))
            facts.append(
                {
                    "out": str(self.out / name),
                    "tasks": len(drifts),
                    "drift": max(worst.values()),
                    "drift_per_module": worst,
                }
            )
        return facts
