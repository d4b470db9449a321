"""``subspace-peft build``: also in several processes, of which the first writes and prints."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SubspaceError
from .verbs import base_model, inspect, number, print_json, unfinished

if TYPE_CHECKING:
    from ..basis import SubspaceBasis
    from ..builders import Clusters


def build(args: Namespace) -> int:
    from ..builders.distributed import process_group
    from ..builders.resume import forget

    if args.out is None and not args.dry_run:
        raise SubspaceError("Say where to write the basis, --out FOLDER, or only look with --dry-run.")
    out = None if args.dry_run else Path(args.out).expanduser()
    beside = None if out is None else unfinished(out)
    clusters: Clusters | None = None
    with process_group() as processes:
        if out is None:
            return _plan(args) if processes.main else 0
        said = ""
        if args.clusters:
            clusters = _clustered(args, beside)
        elif args.from_config:
            said, basis = _rebuilt(args, beside)
        else:
            basis = _built(args, beside)
        if processes.main and clusters is not None:
            clusters.save_pretrained(out)
        elif processes.main:
            basis.to_precision(args.precision or basis.precision or "float32").save_pretrained(out)
        # not before it is written
        processes.exchange()
        if beside is not None and processes.index == processes.neighbours[0]:
            forget(beside)
    if not processes.main:
        return 0
    if clusters is not None:
        return _say(clusters, args, out)
    if said and not args.json:
        print(said)
    return inspect(Namespace(path=str(out), no_verify=True, json=args.json))


def _built(args: Namespace, beside: Path | None) -> SubspaceBasis:
    from ..basis import SubspaceBasis
    from ..builders import build_basis

    return build_basis(
        args.sources or None,
        k=None if args.k is None else number(args.k),
        k_in=args.k_in,
        budget=args.budget,
        builder=args.builder,
        like=None if args.like is None else SubspaceBasis.from_pretrained(args.like),
        weights=args.weights,
        target_modules=args.target_modules,
        **_common(args, beside),
    )


def _common(args: Namespace, beside: Path | None) -> dict[str, Any]:
    """What bases and clusters of them are built with alike."""
    return {
        "alternations": args.alternations,
        "directions": args.directions,
        "leave_one_out": args.leave_one_out,
        "complete": args.complete,
        "base_model": base_model(args),
        "seed": args.seed,
        "skip_bad": args.skip_bad,
        "partial": args.partial,
        "allow_bin": args.allow_bin,
        "max_memory": args.max_memory,
        "work_folder": beside,
        "progress": not args.quiet,
    }


def _clustered(args: Namespace, beside: Path | None) -> Clusters:
    from ..builders import build_clusters

    odd = [name for name in ("from_config", "like", "k_in", "target_modules", "budget") if getattr(args, name)]
    odd += [name for name, usual in (("builder", "adapters"), ("weights", "equal")) if getattr(args, name) != usual]
    if odd:
        raise SubspaceError(f"--clusters does not go with --{odd[0].replace('_', '-')}.")
    given = {} if args.k is None else {"k": number(args.k)}
    found = build_clusters(
        args.sources,
        args.clusters if args.clusters == "auto" else number(args.clusters),
        **given,
        **_common(args, beside),
    )
    return found.to_precision(args.precision or "float32")


def _say(clusters: Clusters, args: Namespace, out: Path) -> int:
    facts = clusters.to_dict()
    if args.json:
        return print_json(facts)
    for step in facts["steps"]:
        print(
            f"  {step['clusters']} clusters (k={step['k']}) keep {step['left_out']:.4f} of sources left out,"
            f" {step['against']} of equal size (k={step['against_k']}) {step['against_left_out']:.4f}: gain"
            f" {step['gain']:.4f} ± {step['standard_error']:.4f}"
        )
    for source in facts["sources"]:
        print(
            f"  {source['name']}: cluster {source['cluster']}, energy kept {source['energy_kept']:.4f} (by one basis"
            f" of equal size {source['energy_kept_single']:.4f})"
        )
    print(
        f"{out}: {len(facts['clusters'])} bases, k={facts['k']}, energy kept {facts['energy_kept']:.4f}; one basis of"
        f" as many numbers, k={facts['single_k']}, {facts['energy_kept_single']:.4f}"
    )
    return 0


def _rebuilt(args: Namespace, beside: Path | None) -> tuple[str, SubspaceBasis]:
    from ..basis import SubspaceBasis
    from ..builders import rebuild_basis

    if args.sources:
        raise SubspaceError("--from-config takes the sources on record; leave the others out.")
    old = SubspaceBasis.from_pretrained(args.from_config)
    new = rebuild_basis(
        old, base_model=base_model(args), max_memory=args.max_memory, work_folder=beside, progress=not args.quiet
    )
    other = f"is not {old.fingerprint}, as on record: other versions or another platform round otherwise"
    return f"built again; the fingerprint {'is the one on record' if new == old else other}", new


def _plan(args: Namespace) -> int:
    from ..builders import plan_build

    plan = plan_build(
        args.sources or None,
        builder=args.builder,
        k=None if args.k is None else number(args.k),
        k_in=args.k_in,
        budget=args.budget,
        alternations=args.alternations,
        complete=args.complete,
        partial=args.partial,
        allow_bin=args.allow_bin,
        max_memory=args.max_memory,
        base_model=base_model(args),
        progress=not args.quiet,
    )
    refused = bool(plan.skipped) and not args.skip_bad
    if args.json:
        print_json(plan.to_dict())
        return int(refused)
    for entry in plan.sources:
        print(
            f"  {entry['name']}: {entry['location']}, ranks {entry['ranks']}, {entry['modules']} modules, norm"
            f" {entry['norm']:.4g}, seed group {entry['seed_group']}"
        )
    for entry in plan.skipped:
        print(f"  {'would be refused' if refused else 'would be left out'}: {entry['reason']}")
    for name, size in plan.modules.items():
        print(
            f"  {name}: {size['out']} x {size['in']}, ranks {size['ranks']} of {size['sources']} sources, k"
            f" {size['k_out']}, {size['k_in']}"
        )
    print(
        f"{len(plan.sources)} sources of {plan.base_model}, {len(plan.modules)} modules; {plan.bytes_to_read:,} bytes"
        f" to read, {plan.bytes_of_basis:,} bytes of basis, about {plan.memory:,} bytes of memory and"
        f" {plan.seconds:.1f} seconds"
    )
    return int(refused)
