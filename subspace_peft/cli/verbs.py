"""What each verb does: the same call that a user's Python makes, and a few printed lines. Imports happen inside."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from ..errors import SubspaceError


def inspect(args: Namespace) -> int:
    from ..report.inspect import inspect_path

    facts = inspect_path(args.path, verify=not args.no_verify)
    if args.json:
        return print_json(facts)
    if facts["kind"] == "task":
        hidden = {"update_norms"}
        _table({key: value for key, value in facts.items() if key not in hidden})
        return 0
    print(f"{facts['location']}: a basis for {facts['modules']} modules of {facts['base_model']}, {facts['k']}")
    print(f"fingerprint {facts['fingerprint']}" + (" (every tensor verified)" if facts["verified"] else ""))
    print(
        f"{facts['frozen_numbers']:,} frozen numbers, {facts['bytes'] or 0:,} bytes; a task:"
        f" {facts['core_numbers_per_task']:,} numbers"
    )
    if "energy_kept" in facts:
        print(f"energy kept {facts['energy_kept']:.4f}; a random basis of equal size {facts['energy_random']:.4f}")
    if facts["precision"]:
        lost = facts["precision"]
        print(
            f"stored as {lost['stored']}, which loses {lost['energy_lost']:.2g} of that energy (at most"
            f" {lost['energy_lost_at_most']:.2g} of any update's)"
        )
    if "energy_left_out" in facts:
        print(f"of a source that was left out, a basis of the others keeps {facts['energy_left_out']:.4f}")
    for source in facts["sources"]:
        print(
            f"  {source['name']}: ranks {source['ranks']}, energy kept {_share(source['energy_kept'])}, seed group"
            f" {source['seed_group']}"
        )
    for entry in facts["skipped"]:
        print(f"  left out: {entry['reason']}")
    return 0


def validate(args: Namespace) -> int:
    from ..report import validate_basis

    facts = validate_basis(args.basis)
    if args.json:
        print_json(facts)
        return int(bool(facts["problems"]))
    for problem in facts["problems"]:
        print(f"  {problem}")
    verdict = f"{len(facts['problems'])} problems" if facts["problems"] else "valid"
    print(
        f"{facts['location']}: {verdict}; {facts['modules']} modules read and hashed, fingerprint"
        f" {facts['fingerprint']}, directions orthonormal to {facts['orthonormality']:.1e}"
    )
    return int(bool(facts["problems"]))


def analyze(args: Namespace) -> int:
    from ..report import analyze_fleet

    found = analyze_fleet(
        args.sources, basis=args.basis, allow_bin=args.allow_bin, base_model=base_model(args), progress=not args.quiet
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
            line += f", the basis keeps {entry['energy_kept']:.4f} (a random one {entry['energy_random']:.4f})"
        print(line + (f", not covered: {entry['not_covered']}" if "not_covered" in entry else ""))
    for one, other, value in found.near_duplicates:
        print(f"  near-duplicates: {one}, {other} (cosine {value:.4f})")
    for entry in found.outliers:
        print(f"  outlier: {entry['name']}: {entry['reason']}")
    for entry in found.skipped:
        print(f"  cannot be used: {entry['reason']}")
    return 0


def report(args: Namespace) -> int:
    from ..report import report_basis

    if importlib.util.find_spec("matplotlib") is None:
        raise SubspaceError("A report's figures need matplotlib: pip install subspace-peft[report].")
    found = report_basis(
        args.basis,
        args.fleet,
        sample=args.sample,
        modules=args.modules,
        seed=args.seed,
        allow_bin=args.allow_bin,
        base_model=base_model(args),
        progress=not args.quiet,
    )
    page = found.save(args.out)
    if args.json:
        return print_json({"page": str(page), **found.to_dict()})
    for line in found.verdict:
        print(line)
    if found.skipped:
        print(f"{len(found.skipped)} adapters were not used; the page says why.")
    print(page)
    return 0


def base_model(args: Namespace) -> Any:
    if not args.base_model:
        return None
    from transformers import AutoModel

    return AutoModel.from_pretrained(args.base_model)


def project(args: Namespace) -> int:
    from ..convert import project_lora

    projection = project_lora(args.lora, args.basis, check_base_model=not args.no_base_check)
    facts = projection.to_dict()
    if args.out:
        facts["out"] = str(projection.save_pretrained(args.out))
    if args.json:
        return print_json(facts)
    for name, share in projection.energy.items():
        print(f"  {share:.4f}  {name}")
    print(
        f"energy kept {projection.energy_kept:.4f} (random basis {projection.energy_random:.4f}), relative error "
        f"{projection.relative_error:.3f}: {projection.verdict}"
    )
    return 0


def export_lora(args: Namespace) -> int:
    from ..convert import export_lora as export

    pad = args.pad_to if args.pad_to in (None, "vllm") else number(args.pad_to)
    result = export(
        args.task,
        args.out,
        basis=args.basis,
        rank=args.rank,
        pad_to=pad,
        modules_to_save=False if args.no_modules_to_save else None,
    )
    if args.json:
        return print_json(result.to_dict())
    print(
        f"{result.folder}: LoRA r={result.rank} for {result.modules} modules, {result.bytes:,} bytes, "
        f"{result.energy_kept:.6f} of the update's energy"
    )
    return 0


def push(args: Namespace) -> int:
    from ..basis import SubspaceBasis
    from ..basis.files import CONFIG_FILE
    from ..bundle import push_bundle
    from ..bundle.format import BUNDLE_FILE
    from ..tasks.push import push_saved_task

    folder = Path(args.folder).expanduser()
    common = {"private": args.private or None, "commit_message": args.message, "create_pr": args.create_pr}
    dependent = {**common, "push_basis_to": args.push_basis_to, "force": args.force, "revision": args.branch}
    if (folder / CONFIG_FILE).is_file():
        kind = "basis"
        commit = SubspaceBasis.from_pretrained(folder).push_to_hub(args.repo_id, branch=args.branch, **common)
    elif (folder / BUNDLE_FILE).is_file():
        kind, commit = "bundle", push_bundle(folder, args.repo_id, **dependent)
    elif (folder / "adapter_config.json").is_file():
        kind, commit = "task", push_saved_task(folder, args.repo_id, **dependent)
    else:
        raise SubspaceError(f"{folder}: neither a basis, a task nor a bundle is in there.")
    if args.json:
        return print_json({"kind": kind, "repo_id": args.repo_id, "revision": commit})
    print(f"{args.repo_id}@{commit} ({kind})")
    return 0


def cache(args: Namespace) -> int:
    from ..basis import cache as kept

    if args.what == "rm" and not args.fingerprint and not args.all:
        raise SubspaceError(
            "cache rm: give the beginning of a fingerprint, or --all. `subspace-peft cache ls` lists them."
        )
    chosen = [kept.find_entry(start) for start in args.fingerprint] or list(kept.entries())
    facts = []
    for entry in chosen:
        fact = {
            "fingerprint": entry.fingerprint,
            "location": entry.location,
            "revision": entry.revision,
            "bytes": entry.bytes,
            "modules": entry.modules,
            "base_model": entry.base_model,
        }
        if args.what == "verify":
            fact["problem"] = kept.verify(entry)
        if args.what == "rm":
            kept.remove(entry)
        facts.append(fact)
    if args.json:
        print_json(facts)
    elif not facts:
        print("The cache is empty.")
    else:
        for fact in facts:
            done = {"rm": "removed: ", "verify": f"{fact.get('problem') or 'intact'}: ", "ls": ""}[args.what]
            print(
                f"{done}{fact['fingerprint'][:12]}  {fact['bytes']:,} bytes, {fact['modules']} modules of"
                f" {fact['base_model']}, from {fact['location']}@{(fact['revision'] or '')[:12]}"
            )
    return 1 if any(fact.get("problem") for fact in facts) else 0


def demo(args: Namespace) -> int:
    from ..recipes import load_recipe

    results = load_recipe("demo").run_demo(args.out, seed=args.seed, quick=args.quick, progress=not args.quiet)
    return print_json(results) if args.json else 0


def copy(args: Namespace) -> int:
    from ..recipes import copy_recipe, list_recipes, recipe_files

    if args.recipe is None:
        known = list_recipes()
        if args.json:
            return print_json(known)
        _table(known)
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
    from ..run import run_script

    run_script(args.script)
    return 0


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


def number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        with contextlib.suppress(ValueError):
            if math.isfinite(number := float(text)):
                return number
        raise SubspaceError(f"{text!r} is no number.") from None


def unfinished(out: str | Path) -> Path | None:
    """Where finished modules of what goes to `out` are kept until all are: ``<out>.partial``; nowhere where `out` has
    no name."""
    out = Path(out).expanduser()
    return out.with_name(f"{out.name}.partial") if out.name else None


def print_json(facts: dict[str, Any]) -> int:
    print(json.dumps(facts, indent=2, default=str))
    return 0


def _table(facts: dict[str, Any]) -> None:
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key:<{width}}  {value}")
