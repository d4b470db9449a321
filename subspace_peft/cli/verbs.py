"""What each verb does: the same call that a user's Python makes, and a few printed lines. Imports happen inside."""

from __future__ import annotations

import contextlib
import json
import math
from argparse import Namespace
from typing import Any

from ..errors import SubspaceError


def build(args: Namespace) -> int:
    from pathlib import Path

    from ..basis import SubspaceBasis
    from ..build import build_basis
    from ..build.resume import forget

    out = Path(args.out).expanduser()
    unfinished = out.with_name(f"{out.name}.partial") if out.name else None
    base = None
    if args.base_model:
        from transformers import AutoModel

        base = AutoModel.from_pretrained(args.base_model)
    basis = build_basis(
        args.sources or None,
        k=_number(args.k),
        k_in=args.k_in,
        builder=args.builder,
        like=None if args.like is None else SubspaceBasis.from_pretrained(args.like),
        weights=args.weights,
        alternations=args.alternations,
        directions=args.directions,
        base_model=base,
        target_modules=args.target_modules,
        seed=args.seed,
        skip_bad=args.skip_bad,
        partial=args.partial,
        max_memory=args.max_memory,
        work_folder=unfinished,
        progress=not args.quiet,
    )
    basis.save_pretrained(out)
    if unfinished is not None:
        forget(unfinished)
    return inspect(Namespace(path=str(out), no_verify=True, json=args.json))


def inspect(args: Namespace) -> int:
    from ..report.inspect import inspect_path

    facts = inspect_path(args.path, verify=not args.no_verify)
    if args.json:
        return _json(facts)
    if facts["kind"] == "task":
        hidden = {"update_norms"}
        _table({key: value for key, value in facts.items() if key not in hidden})
        return 0
    print(f"{facts['location']}: a basis for {facts['modules']} modules of {facts['base_model']}, {facts['k']}")
    print(f"fingerprint {facts['fingerprint']}" + (" (every tensor verified)" if facts["verified"] else ""))
    print(
        f"{facts['frozen_numbers']:,} frozen numbers, {facts['bytes'] or 0:,} bytes; a task: {facts['core_numbers_per_task']:,} numbers"
    )
    if "energy_kept" in facts:
        print(f"energy kept {facts['energy_kept']:.4f}; a random basis of equal size {facts['energy_random']:.4f}")
    for source in facts["sources"]:
        print(
            f"  {source['name']}: ranks {source['ranks']}, energy kept {source['energy_kept']:.4f}, seed group {source['seed_group']}"
        )
    for entry in facts["skipped"]:
        print(f"  left out: {entry['reason']}")
    return 0


def project(args: Namespace) -> int:
    from ..convert import project_lora

    projection = project_lora(args.lora, args.basis, check_base_model=not args.no_base_check)
    facts = projection.to_dict()
    if args.out:
        facts["out"] = str(projection.save_pretrained(args.out))
    if args.json:
        return _json(facts)
    for name, share in projection.energy.items():
        print(f"  {share:.4f}  {name}")
    print(
        f"energy kept {projection.energy_kept:.4f} (random basis {projection.energy_random:.4f}), relative error "
        f"{projection.relative_error:.3f}: {projection.verdict}"
    )
    return 0


def export_lora(args: Namespace) -> int:
    from ..convert import export_lora as export

    pad = args.pad_to if args.pad_to in (None, "vllm") else _number(args.pad_to)
    result = export(
        args.task, args.out, basis=args.basis, rank=args.rank, pad_to=pad, modules_to_save=not args.no_modules_to_save
    )
    if args.json:
        return _json(result.to_dict())
    print(
        f"{result.folder}: LoRA r={result.rank} for {result.modules} modules, {result.bytes:,} bytes, "
        f"{result.energy_kept:.6f} of the update's energy"
    )
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
            "fingerprint": entry.fingerprint, "location": entry.location, "revision": entry.revision, "bytes": entry.bytes,
            "modules": entry.modules, "base_model": entry.base_model,
        }  # fmt: skip
        if args.what == "verify":
            fact["problem"] = kept.verify(entry)
        if args.what == "rm":
            kept.remove(entry)
        facts.append(fact)
    if args.json:
        _json(facts)
    elif not facts:
        print("The cache is empty.")
    else:
        for fact in facts:
            done = {"rm": "removed: ", "verify": f"{fact.get('problem') or 'intact'}: ", "ls": ""}[args.what]
            print(
                f"{done}{fact['fingerprint'][:12]}  {fact['bytes']:,} bytes, {fact['modules']} modules of {fact['base_model']}, from "
                f"{fact['location']}@{(fact['revision'] or '')[:12]}"
            )
    return 1 if any(fact.get("problem") for fact in facts) else 0


def demo(args: Namespace) -> int:
    from ..demo import run_demo

    results = run_demo(args.out, seed=args.seed, quick=args.quick, progress=not args.quiet)
    return _json(results) if args.json else 0


def copy(args: Namespace) -> int:
    from ..recipes import copy_recipe, list_recipes

    if args.recipe is None:
        known = list_recipes()
        if args.json:
            return _json(known)
        _table(known)
        return 0
    file = copy_recipe(args.recipe, args.out, force=args.force)
    if args.json:
        return _json({"file": str(file)})
    print(file)
    return 0


def run(args: Namespace) -> int:
    from ..run import run_script

    run_script(args.script)
    return 0


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        with contextlib.suppress(ValueError):
            if math.isfinite(number := float(text)):
                return number
        raise SubspaceError(f"{text!r} is no number.") from None


def _json(facts: dict[str, Any]) -> int:
    print(json.dumps(facts, indent=2, default=str))
    return 0


def _table(facts: dict[str, Any]) -> None:
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key:<{width}}  {value}")
