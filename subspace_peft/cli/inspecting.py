"""``subspace-peft inspect``, `validate`, `analyze` and `report`. Imports happen inside."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from typing import Any

from ..energy import EXPLAINED, OVER_MODULES, percent
from ..errors import SubspaceError
from .common import (
    ALLOW_BIN_HELP,
    BASE_MODEL_HELP,
    Add,
    add_base_model_name,
    add_force,
    add_json,
    add_quiet,
    base_model,
    print_json,
    print_table,
)
from .language import hints_in_flags


def add_inspect(add: Add) -> None:
    """Add the verb ``inspect``."""
    verb = add(
        "inspect", help="say what a basis or a task is", description="Say what a basis or a task is; verify it."
    )
    verb.add_argument("path", help="folder or Hub id")
    verb.add_argument("--no-verify", action="store_true", help="do not read and hash every tensor")
    add_json(verb)
    verb.set_defaults(run=inspect)


def add_validate(add: Add) -> None:
    """Add the verb ``validate``."""
    verb = add(
        "validate",
        help="check a basis file",
        description=(
            "Check a basis: hashes, fingerprint, shapes, finite values, orthonormal directions. Exit status 1 if"
            " anything is wrong."
        ),
    )
    verb.add_argument("basis", help="folder or Hub id")
    add_json(verb)
    verb.set_defaults(run=validate)


def add_analyze(add: Add) -> None:
    """Add the verb ``analyze``."""
    verb = add(
        "analyze",
        help="compare adapters with one another, and with a basis",
        description=(
            "Pairwise similarity of the adapters' updates, near-duplicates, shared seeds, outliers, and what a basis"
            " keeps of each."
        ),
    )
    verb.add_argument("sources", nargs="+", metavar="ADAPTER", help="as for build")
    verb.add_argument("--basis", help="folder or Hub id of a basis")
    verb.add_argument("--base-model", help=BASE_MODEL_HELP)
    add_base_model_name(verb)
    verb.add_argument("--allow-bin", action="store_true", help=ALLOW_BIN_HELP)
    add_json(verb)
    add_quiet(verb)
    verb.set_defaults(run=analyze)


def add_report(add: Add) -> None:
    """Add the verb ``report``."""
    verb = add(
        "report",
        help="say what a basis is worth for a fleet",
        description=(
            "Hold a basis against a fleet, from weights alone: spectra beside noise of the same strength, what it"
            " keeps of adapters it has seen and has not, what it would keep with another k, and a verdict. Writes one"
            " HTML file."
        ),
    )
    verb.add_argument("basis", help="folder or Hub id")
    verb.add_argument(
        "--fleet",
        nargs="+",
        metavar="ADAPTER",
        help="as for build; default: the basis's own sources, where they still are",
    )
    verb.add_argument(
        "--out", default="basis-report", metavar="PLACE", help="a folder, or a file.html (default: %(default)s)"
    )
    verb.add_argument(
        "--files", action="store_true", help="write report.json, tables as CSV and figures as PNG beside the page"
    )
    add_force(verb, "such as a report on another basis")
    verb.add_argument(
        "--sample", type=int, default=64, metavar="N", help="measure at most so many adapters (default: %(default)s)"
    )
    verb.add_argument(
        "--modules", type=int, metavar="N", help="measure so many modules (default: all, 16 where ranks are many)"
    )
    verb.add_argument("--seed", type=int, default=0, help="of the sample, the folds and the noise")
    verb.add_argument("--base-model", help=BASE_MODEL_HELP)
    add_base_model_name(verb)
    verb.add_argument("--allow-bin", action="store_true", help=ALLOW_BIN_HELP)
    add_json(verb)
    add_quiet(verb)
    verb.set_defaults(run=report)


def inspect(args: Namespace) -> int:
    """Say what a basis or a task is."""
    from ..report.inspect import inspect_path

    facts = inspect_path(args.path, verify=not args.no_verify)
    if args.json:
        return print_json(facts)
    if facts["kind"] == "task":
        hidden = {"update_norms"}
        print_table({key: value for key, value in facts.items() if key not in hidden})
        return 0
    base = facts["base_model"] or "a base model that is not named"
    print(f"{facts['location']}: a basis for {facts['modules']} modules of {base}, {facts['k']}")
    print(f"base weights: {facts['base_weights']}")
    _say_names(facts["base_model"], facts["base_model_names"])
    print(f"fingerprint {facts['fingerprint']}" + (" (every tensor verified)" if facts["verified"] else ""))
    print(
        f"{facts['frozen_numbers']:,} frozen parameters, {facts['bytes'] or 0:,} bytes; a task:"
        f" {facts['core_numbers_per_task']:,} parameters"
    )
    for line in energy_lines(facts):
        print(line)
    for source in facts["sources"]:
        least = "at least " if source.get("energy_kept_at_least") else ""
        kept = source.get("energy_kept")
        print(
            f"  {source['name']}: ranks {source['ranks']}, energy kept"
            f" {'unknown' if kept is None else least + percent(kept)}, seed group {source['seed_group']}"
        )
    for entry in facts["skipped"]:
        print(f"  left out: {entry['reason']}")
    print(*facts["verdict"], sep="\n")
    return 0


def _say_names(taken: str | None, names: dict[str, Any] | None) -> None:
    """Say which other names the sources give the base model."""
    if not names:
        return
    if names["replaced"]:
        others = sorted(set(names["replaced"].values()))
        why = "as the user said" if names["said"] else "other spellings"
        print(f"base model: {len(names['replaced'])} sources call it {', '.join(others[:5])} ({why})")
    if names["unnamed"]:
        print(f"base model: {len(names['unnamed'])} sources name none, and were taken to be of {taken}")


def energy_lines(facts: dict[str, Any]) -> list[str]:
    """Return what a basis keeps, line by line.

    Args:
        facts: of `inspect_path`.
    """

    def said(key: str) -> str:
        over = key in facts.get("energy_over_modules", ())
        return percent(facts[f"energy_{key}"]) + (f" ({OVER_MODULES})" if over else "")

    lines = []
    if "energy_kept" in facts:
        least = "at least " if facts.get("energy_kept_at_least") else ""
        random = f"; random directions keep {said('random')}" if "energy_random" in facts else ""
        lines.append(f"energy kept {least}{said('kept')} (energy: {EXPLAINED}){random}")
    if facts["precision"]:
        lost = facts["precision"]
        lines.append(
            f"stored as {lost['stored']}, which loses {lost['energy_lost']:.2g} of that energy (at most"
            f" {lost['energy_lost_at_most']:.2g} of any update's)"
        )
    if "energy_left_out" in facts:
        lines.append(f"of a source that was left out, a basis of the others keeps {said('left_out')}")
    return lines


def validate(args: Namespace) -> int:
    """Check a basis; the exit status is 1 where anything is wrong."""
    from ..report import validate_basis

    facts = validate_basis(args.basis)
    if args.json:
        print_json(facts)
        return int(bool(facts["problems"]))
    for problem in facts["problems"]:
        print(f"  {problem}")
    least = "at least " if facts["energy_kept_at_least"] else ""
    kept = "" if facts["energy_kept"] is None else f", energy kept {least}{percent(facts['energy_kept'])}"
    verdict = f"{len(facts['problems'])} problems" if facts["problems"] else "valid"
    print(
        f"{facts['location']}: {verdict}; {facts['modules']} modules read and hashed, fingerprint"
        f" {facts['fingerprint']}, directions orthonormal to {facts['orthonormality']:.1e}{kept}"
    )
    return int(bool(facts["problems"]))


def analyze(args: Namespace) -> int:
    """Compare adapters with one another, and with a basis."""
    from ..report import analyze_fleet

    found = analyze_fleet(
        args.sources,
        basis=args.basis,
        allow_bin=args.allow_bin,
        base_model=base_model(args.base_model),
        base_model_name=args.base_model_name,
        progress=not args.quiet,
    )
    if args.json:
        return print_json(found.to_dict())
    for entry in found.sources:
        line = (
            f"  {entry['name']}: ranks {entry['ranks']}, {entry['modules']} modules, norm {entry['norm']:.4g}, seed"
            f" group {entry['seed_group']}"
        )
        if "nearest" in entry:
            line += f", nearest {entry['nearest']} (cosine {entry['nearest_cosine']:.3f})"
        if "energy_kept" in entry:
            line += (
                f", energy kept {percent(entry['energy_kept'])} (random directions {percent(entry['energy_random'])})"
            )
        print(line + (f", not covered: {entry['not_covered']}" if "not_covered" in entry else ""))
    for one, other, value in found.near_duplicates:
        print(f"  near-duplicates: {one}, {other} (cosine {value:.4f})")
    for entry in found.outliers:
        print(f"  outlier: {entry['name']}: {entry['reason']}")
    for entry in found.skipped:
        print(f"  cannot be used: {entry['reason']}")
    return 0


def report(args: Namespace) -> int:
    """Write a report on a basis and say its verdict."""
    from ..basis import SubspaceBasis
    from ..basis.overwriting import check_target
    from ..report import report_basis
    from ..report.fleet_report import planned_report

    if args.files and importlib.util.find_spec("matplotlib") is None:
        raise SubspaceError("A report's PNG files need matplotlib: pip install subspace-peft[report].")
    basis = SubspaceBasis.from_pretrained(args.basis)
    planned = planned_report(args.out, {"fingerprint": basis.fingerprint})
    check_target(args.out, planned, overwrite=args.force, inputs=[args.basis])
    found = report_basis(
        basis,
        args.fleet,
        sample=args.sample,
        modules=args.modules,
        seed=args.seed,
        allow_bin=args.allow_bin,
        base_model=base_model(args.base_model),
        base_model_name=args.base_model_name,
        progress=not args.quiet,
    )
    page = found.save(args.out, files=args.files, overwrite=args.force)
    if args.json:
        return print_json({"page": str(page), **found.to_dict()})
    for line in found.verdict:
        print(hints_in_flags(line, args.flags))
    if found.skipped:
        print(f"{len(found.skipped)} adapters were not used; the page says why.")
    print(page)
    return 0
