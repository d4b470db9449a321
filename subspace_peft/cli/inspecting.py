"""``subspace-peft inspect`` and `validate`. Imports happen inside."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from .._shown import said_of_directions
from ..energy import EXPLAINED, OVER_MODULES, percent
from .common import Add, add_json, print_json, print_table
from .parsers import RUNS, grouped


def add_inspect(add: Add) -> None:
    """Add the verb ``inspect``."""
    verb = add(
        "inspect",
        help="say what a basis or a task is",
        description=(
            "Say what a basis or a task is: its base model, sizes, sources and what it keeps of them. Every tensor of"
            " a basis is read and held against its hash; -v lists the modules."
        ),
    )
    verb.add_argument("path", metavar="PATH", help="folder or Hub id of a basis or a task")
    grouped(verb, RUNS).add_argument("--no-verify", action="store_true", help="do not read and hash every tensor")
    add_json(verb)
    verb.set_defaults(run=inspect)


def add_validate(add: Add) -> None:
    """Add the verb ``validate``."""
    verb = add(
        "validate",
        help="check a basis file",
        description=(
            "Check a basis: hashes, fingerprint, shapes, finite values, orthonormal directions, and whether its record"
            " fits. The exit status is 1 if anything is wrong."
        ),
    )
    verb.add_argument("basis", metavar="BASIS", help="folder or Hub id")
    add_json(verb)
    verb.set_defaults(run=validate)


def inspect(args: Namespace) -> int:
    """Say what a basis or a task is."""
    from ..report.inspect import inspect_path

    facts = inspect_path(args.path, verify=not args.no_verify)
    if args.json:
        return print_json(facts)
    if facts["kind"] == "task":
        words = {} if args.verbose else {"own_directions": said_of_directions(facts["own_directions"])}
        hidden = set() if args.verbose else {"update_norms"}
        print_table({key: words.get(key, value) for key, value in facts.items() if key not in hidden})
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
    if getattr(args, "verbose", 0):
        for name, shape in facts["shapes"].items():
            print(f"  {name}: {shape['out']} x {shape['in']}, k {shape['k_out']}, {shape['k_in']}")
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
