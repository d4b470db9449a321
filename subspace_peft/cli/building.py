"""``subspace-peft build``: also in several processes, of which the first writes and prints."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from .._io.progress import begin
from ..builders.options import BuildOptions, Resources
from ..energy import percent
from ..errors import SubspaceError
from .build_request import PRECISIONS, Request, opened, read_request
from .common import (
    Add,
    add_base_model,
    add_force,
    add_json,
    add_out,
    kept_for_force,
    print_json,
    refuse_idle,
    unfinished,
)
from .flags import add_options, as_in_file
from .inspecting import inspect
from .language import hints_in_flags
from .parsers import METHOD, RUNS, SOURCES, STORED, grouped

if TYPE_CHECKING:
    from ..basis import SubspaceBasis
    from ..builders import BuildPlan, Clusters


def add_build(add: Add) -> None:
    """Add the verb ``build``."""
    verb = add(
        "build",
        help="build a basis from LoRA adapters",
        description=(
            "Build a basis from the LoRA adapters of one base model, and say what it keeps of them and of adapters"
            " left out. Interrupted, the same command goes on from the modules kept in FOLDER.partial; started by"
            " `accelerate launch -m subspace_peft build …`, processes and machines divide the work."
        ),
    )
    verb.add_argument(
        "sources",
        nargs="*",
        metavar="ADAPTER",
        help=(
            "LoRA folder or file, org/name[@revision][:folder], collection:owner/slug, a pattern, or a .txt with one a"
            " line"
        ),
    )
    sources = grouped(verb, SOURCES)
    sources.add_argument(
        "--config",
        metavar="FILE",
        help=(
            "YAML or JSON with `sources:` (paths, Hub ids, or mappings with `model:` and `weight:`) and the options"
            " here by their names (`k: 16`, `skip_bad: true`); flags given here win. A basis's folder is such a file"
        ),
    )
    sources.add_argument(
        "--from-config",
        metavar="BASIS",
        help="build a basis again: its own sources, held against their hashes, and its arguments",
    )
    add_options(verb, BuildOptions)
    grouped(verb, METHOD).add_argument(
        "--like", metavar="BASIS", help="a basis whose modules and sizes the builder `random` takes over"
    )
    grouped(verb, METHOD).add_argument(
        "--clusters",
        metavar="N",
        help=(
            "several bases, FOLDER/cluster-0 …, of the parts of the fleet that they keep most of: a number, or 'auto'"
            " for as many as pay"
        ),
    )
    grouped(verb, STORED).add_argument(
        "--precision",
        choices=PRECISIONS,
        help="what U and V are stored as (default: float32); the basis says how much of the energy that loses",
    )
    add_base_model(
        verb,
        "model id or folder: for the builders `random` and `base-weights`, for --complete base-weights, and to convert"
        " adapters that are no LoRA",
    )
    add_out(verb, "where to write the basis")
    add_force(verb)
    add_json(verb)
    grouped(verb, RUNS).add_argument(
        "--dry-run", action="store_true", help="read and check everything, say what building takes, build nothing"
    )
    add_options(verb, Resources)
    verb.set_defaults(run=build)


def build(args: Namespace) -> int:
    """Build a basis or clusters of them and say what they are; or plan that, which makes the same checks."""
    from ..builders.distributed import process_group
    from ..builders.resume import forget

    if args.out is None and args.dry_run:
        refuse_idle(args, "--force", "without --out: nothing is written")
    if args.out is None and not args.dry_run:
        raise SubspaceError("Say where to write the basis, --out FOLDER, or only look with --dry-run.")
    out = None if args.out is None else Path(args.out).expanduser()
    in_file: set[str] = set()
    with process_group() as processes, as_in_file(in_file):
        request = read_request(args, out, in_file)
        if args.dry_run:
            return _say_plan(_planned(request), args, bool(request.options.skip_bad)) if processes.main else 0
        assert out is not None
        made, said = _made(request)
        begin("writing the basis")
        if processes.main:
            with kept_for_force(unfinished(out)):
                made.save_pretrained(out, overwrite=args.force)
        # not before it is written
        processes.exchange()
        beside = request.resources.work_folder
        if beside is not None and processes.index == processes.neighbours[0]:
            forget(Path(beside))
    if not processes.main:
        return 0
    if request.inputs.get("clusters") is not None:
        return _say_clusters(made, args.json, out)
    if said and not args.json:
        print(said)
    return inspect(Namespace(path=str(out), no_verify=True, json=args.json, verbose=args.verbose))


def _made(request: Request) -> tuple[SubspaceBasis | Clusters, str]:
    """Build; returns the basis or bases, and how a basis that was built again compares with the one on record."""
    from ..builders import build_basis, build_clusters, rebuild_basis

    given, precision = opened(request), request.inputs.get("precision")
    if (clusters := request.inputs.get("clusters")) is not None:
        return build_clusters(clusters=clusters, **given).to_precision(precision or "float32"), ""
    if request.again is None:
        return build_basis(**given).to_precision(precision or "float32"), ""
    old, made = given["basis"], rebuild_basis(**given)
    other = f"is not {old.fingerprint}, as on record: other versions or another platform round otherwise"
    said = f"built again; the fingerprint {'is the one on record' if made == old else other}"
    return made.to_precision(precision or made.precision or "float32"), said


def _planned(request: Request) -> BuildPlan:
    from ..builders import plan_build, plan_rebuild

    given = opened(request)
    precision = request.inputs.get("precision")
    if request.again is not None:
        return plan_rebuild(precision=precision, **given)
    return plan_build(clusters=request.inputs.get("clusters"), precision=precision or "float32", **given)


def _say_clusters(clusters: Clusters, as_json: bool, out: Path) -> int:
    from ..report.verdict_clusters import verdict_of_clusters

    facts = clusters.to_dict()
    facts["verdict"] = verdict_of_clusters(facts, str(out))
    if as_json:
        return print_json(facts)
    for step in facts["steps"]:
        print(
            f"  {step['clusters']} clusters (k={step['k']}) keep {percent(step['left_out'])} of sources left out,"
            f" {step['against']} of equal size (k={step['against_k']}) {percent(step['against_left_out'])}: gain"
            f" {100 * step['gain']:.1f} ± {100 * step['standard_error']:.1f} points"
        )
    for source in facts["sources"]:
        print(
            f"  {source['name']}: cluster {source['cluster']}, energy kept {percent(source['energy_kept'])} (by one"
            f" basis of equal size {percent(source['energy_kept_single'])})"
        )
    print(
        f"{out}: {len(facts['clusters'])} bases, k={facts['k']}, energy kept"
        f" {percent(facts['energy_kept'])}; one basis of as many parameters, k={facts['single_k']},"
        f" {percent(facts['energy_kept_single'])}"
    )
    print(*facts["verdict"], sep="\n")
    return 0


def _say_plan(plan: BuildPlan, args: Namespace, skip_bad: bool) -> int:
    refused = bool(plan.skipped) and not skip_bad
    if args.json:
        print_json(plan.to_dict())
        return int(refused)
    for entry in plan.sources:
        print(
            f"  {entry['name']}: {entry['location']}, ranks {entry['ranks']}, {entry['modules']} modules, norm"
            f" {entry['norm']:.4g}, seed group {entry['seed_group']}"
        )
    for entry in plan.skipped:
        reason = hints_in_flags(entry["reason"], args.flags)
        print(f"  {'would be refused' if refused else 'would be left out'}: {reason}")
    for name, size in plan.modules.items():
        print(
            f"  {name}: {size['out']} x {size['in']}, ranks {size['ranks']} of {size['sources']} sources, k"
            f" {size['k_out']}, {size['k_in']}"
        )
    most = f" to {plan.bytes_at_most:,}" if plan.bytes_at_most > plan.bytes_of_basis else ""
    base = plan.base_model or "a base model that is not named"
    print(
        f"{len(plan.sources)} sources of {base}, {len(plan.modules)} modules; {plan.bytes_to_read:,} bytes"
        f" to read, {plan.bytes_of_basis:,}{most} bytes of basis, about {plan.memory:,} bytes of memory and"
        f" {plan.seconds:.1f} seconds"
    )
    return int(refused)
