"""``subspace-peft migrate``, and the tasks that `update` carries over."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._io.progress import begin
from .._lazy import collecting_later
from ..errors import SubspaceError
from .common import Add, add_basis, add_force, add_json, add_out, print_json
from .parsers import SOURCES, TASKS, grouped

LISTED = 20  # tasks that are said one by one


def add_migrate(add: Add) -> None:
    """Add the verb ``migrate``."""
    verb = add(
        "migrate",
        help="carry tasks over to another version of their basis",
        description=(
            "Carry tasks and bundles over to another basis, and say how much of their updates' norm that changes."
            " All of them are written, or none."
        ),
    )
    verb.add_argument("tasks", nargs="+", metavar="TASK", help="folder or Hub id of a task, or a bundle's folder")
    add_basis(verb, "folder or Hub id of the basis to carry them to", required=True)
    grouped(verb, SOURCES).add_argument(
        "--old-basis", metavar="BASIS", help="where their own basis is, if not where they say"
    )
    add_carrying(grouped(verb, TASKS))
    add_out(verb, "where to write them, each under its own name", required=True)
    add_force(verb)
    add_json(verb)
    verb.set_defaults(run=migrate)


def add_carrying(group: Any) -> None:
    """Add the flags that say how tasks are carried over: how much may change, and whether they grow along."""
    group.add_argument(
        "--no-pad",
        action="store_true",
        help="keep tensors byte for byte, on a basis that begins with the tasks' own, instead of padding with zeros",
    )
    group.add_argument(
        "--max-drift",
        type=float,
        metavar="SHARE",
        help="refuse where more than this share of an update's norm changes in a module (default: rounding only)",
    )


def migrate(args: Namespace) -> int:
    """Carry tasks over; all of them or none."""
    from ..basis import SubspaceBasis

    with collecting_later():
        from ..convert.migrate import MAX_DRIFT

    bound = MAX_DRIFT if args.max_drift is None else args.max_drift
    tasks = Carried(args.tasks, args.out, bound, not args.quiet, args.old_basis, args.force, not args.no_pad)
    new = SubspaceBasis.from_pretrained(args.basis)
    tasks.check_folders(new.fingerprint, needed=[args.basis, args.old_basis])
    begin("carrying tasks over")
    tasks.try_out(new)
    begin("writing the tasks")
    facts = tasks.write(new)
    return (
        print_json({"fingerprint": new.fingerprint, "tasks": facts}) if args.json else say_carried(facts, args.verbose)
    )


def say_carried(tasks: list[dict[str, Any]], verbose: int) -> int:
    """Say how much of their updates' norm tasks changed by: of each, or of the worst where there are many."""
    if not verbose and len(tasks) > LISTED:
        print(f"{len(tasks)} tasks and bundles were carried over; -v shows each, this is the one that changed most:")
        tasks = [max(tasks, key=lambda each: each["drift"])]
    for each in tasks:
        worst = max(each["drift_per_module"], key=each["drift_per_module"].__getitem__)
        converted = f", {each['converted_from']} coefficients became core" if each.get("converted_from") else ""
        print(
            f"  {each['out']}: drift {each['drift']:.1e}, at most {each['drift_per_module'][worst]:.1e}"
            f" ({worst}){converted}"
        )
    return 0


class Carried:
    """Tasks and bundles on their way to another basis: tried first, written when all of them can be."""

    def __init__(
        self,
        references: list[str],
        out: str | None,
        max_drift: float,
        progress: bool,
        old_basis: str | None = None,
        overwrite: bool = False,
        pad: bool = True,
    ) -> None:
        from ..bundle.format import BUNDLE_FILE
        from ..hub import split_revision

        self.out, self.progress, self.old_basis = Path(out or "."), progress, old_basis
        self.how = {"max_drift": max_drift, "pad": pad, "old_basis": old_basis}
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

    def read(self) -> dict[str, Any]:
        """Return all tasks, by name; those of a bundle by ``bundle/name``."""
        from ..bundle import open_bundle
        from ..tasks import read_task

        found = {name: read_task(repo, basis=self.old_basis, **hub) for name, (repo, hub) in self.tasks.items()}
        for name, folder in self.bundles.items():
            bundle = open_bundle(folder)
            found |= {f"{name}/{each}": bundle.task(each, self.old_basis) for each in bundle}
        return found

    def cores(self) -> list[dict[str, Any]]:
        """Return the cores of all tasks, in units of ΔW."""
        return [task.cores for task in self.read().values()]

    def try_out(self, basis: Any) -> None:
        """Carry the tasks over, in memory; raises before anything is written."""
        from ..bundle.migrate import bundle_drifts
        from ..convert import migrate_task

        for folder in self.bundles.values():
            bundle_drifts(folder, basis, progress=self.progress, **self.how)
        for name, (repo, hub) in self.tasks.items():
            self.done[name] = migrate_task(repo, basis, **self.how, **hub)

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
                overwrite=self.overwrite,
                progress=self.progress,
                **self.how,
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
