"""``subspace-peft build``: also in several processes, of which the first writes and prints."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..builders.build_file import BASIS_CONFIG, INPUTS, BuildFile, read_build_file
from ..builders.options import BuildOptions, Resources
from ..energy import percent
from ..errors import SubspaceError
from .common import (
    Add,
    add_force,
    add_json,
    base_model,
    earlier_record,
    kept_for_force,
    print_json,
    refuse_idle,
    unfinished,
)
from .flags import add_options, as_in_file, flag_of, given_options
from .inspecting import inspect
from .language import hints_in_flags

if TYPE_CHECKING:
    from ..basis import SubspaceBasis
    from ..builders import BuildPlan, Clusters

PRECISIONS = ["float32", "bfloat16", "float16", "int8"]


@dataclass(frozen=True)
class Request:
    """A build as it was asked for, by a file and by flags.

    Attributes:
        sources: references; None where there are none.
        options: which basis to build.
        resources: how much building may take.
        inputs: ``base_model``, ``like``, ``clusters`` and ``precision``, where given.
        again: a basis to build again, from its own record.
    """

    sources: list[Any] | None
    options: BuildOptions
    resources: Resources
    inputs: dict[str, Any]
    again: str | None = None


def add_build(add: Add) -> None:
    """Add the verb ``build``."""
    verb = add(
        "build",
        help="build a basis from LoRA adapters",
        description=(
            "Build a basis from LoRA adapters. Interrupted, the same command goes on from the modules kept in"
            " FOLDER.partial. Started by `accelerate launch -m subspace_peft build …`, processes and machines divide"
            " the work."
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
    verb.add_argument("--out", metavar="FOLDER", help="where to write the basis")
    add_force(verb)
    verb.add_argument(
        "--dry-run", action="store_true", help="read and check everything, say what building takes, build nothing"
    )
    verb.add_argument(
        "--config",
        metavar="FILE",
        help=(
            "YAML or JSON with `sources:` (paths, Hub ids, or mappings with `model:` and `weight:`) and the options"
            " below by their names (`k: 16`, `skip_bad: true`); flags given here win. A basis's folder is such a file"
        ),
    )
    verb.add_argument(
        "--from-config",
        metavar="BASIS",
        help="build a basis again: its own sources, held against their hashes, and its arguments",
    )
    add_options(verb, BuildOptions)
    verb.add_argument("--like", metavar="BASIS", help="a basis whose modules and sizes `random` takes over")
    verb.add_argument(
        "--base-model",
        help=(
            "model id or folder: for `random` and `base-weights`, --complete base-weights, and to convert adapters"
            " that are no LoRA"
        ),
    )
    verb.add_argument(
        "--clusters",
        metavar="N",
        help=(
            "several bases, FOLDER/cluster-0 …, of the parts of the fleet that they keep most of: a number, or 'auto'"
            " for as many as pay"
        ),
    )
    verb.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="what U and V are stored as (default: float32); the basis says what of the energy that loses",
    )
    add_options(verb, Resources)
    add_json(verb)
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
        request = _request(args, out, in_file)
        if args.dry_run:
            return _say_plan(_planned(request), args, bool(request.options.skip_bad)) if processes.main else 0
        assert out is not None
        made, said = _made(request)
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
    return inspect(Namespace(path=str(out), no_verify=True, json=args.json))


def _request(args: Namespace, out: Path | None, in_file: set[str]) -> Request:
    """Put together a file and the flags, which win, and check all that needs no source.

    Args:
        args: the flags.
        out: where the basis is to be written.
        in_file: gets the names of the settings that are the file's.
    """
    again = args.from_config
    file = BuildFile()
    given = given_options(args, BuildOptions)
    if again is not None:
        if args.config is not None:
            raise SubspaceError("--from-config and --config are two builds. Give one of them.")
        place = Path(again).expanduser()
        if place.is_file() and place.name != BASIS_CONFIG:
            again, file = None, read_build_file(place)
        elif place.is_file():
            again = str(place.parent)
        _check_again(args, given)
    elif args.config is not None:
        file = read_build_file(args.config)
    settings = {**(file.settings if "weights" in given else file.settings_for(args.sources)), **given}
    for name in INPUTS:
        if (value := getattr(args, name)) is not None:
            settings[name] = value
    in_file.update(name for name in file.settings if name not in given and getattr(args, name, None) is None)
    inputs = {name: settings.pop(name) for name in INPUTS if name in settings}
    resources = {key: inputs.pop(key) for key in ("max_memory",) if key in inputs}
    if args.progress is not None:
        resources["progress"] = args.progress
    if out is not None:
        resources["work_folder"] = unfinished(out)
    options = BuildOptions(**settings)
    inputs = _checked(inputs)
    sources = list(args.sources or file.sources) or None
    if out is not None:
        _check_out(out, args.force, options, sources, inputs, again)
    return Request(sources, options, Resources(**resources), inputs, again)


def _check_again(args: Namespace, given: dict[str, Any]) -> None:
    """Raise `SubspaceError` where a rebuild is given what only a new build decides."""
    if args.sources:
        raise SubspaceError("--from-config takes the sources on record; leave the others out.")
    odd = [*given, *(name for name in ("like", "clusters") if getattr(args, name) is not None)]
    if odd:
        raise SubspaceError(
            f"--from-config takes the options on record; leave {flag_of(odd[0])} out. --config takes the same record"
            " as a beginning, of which flags change parts."
        )


def _checked(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs that are there, with numbers read; raise `SubspaceError` where they clash."""
    found = {name: value for name, value in inputs.items() if value is not None}
    if (precision := found.get("precision")) not in (None, *PRECISIONS):
        raise SubspaceError(
            f"precision={precision!r}: there is no such choice; choose one of {', '.join(PRECISIONS)}."
        )
    clusters = found.get("clusters")
    if isinstance(clusters, str) and clusters != "auto":
        if not clusters.isdecimal():
            raise SubspaceError(f"clusters={clusters!r}: give a number from 1 on, or 'auto'.")
        found["clusters"] = int(clusters)
    if clusters is not None and "like" in found:
        raise SubspaceError("clusters= does not go with like=: clusters are of sources.")
    return found


def _check_out(
    out: Path,
    force: bool,
    options: BuildOptions,
    sources: list[Any] | None,
    inputs: dict[str, Any],
    again: str | None,
) -> None:
    """Raise where the basis may not be written into `out`, before it is built.

    An earlier basis of the same call is no reason: whether it is the same shows when the new one is written, and until
    then the finished modules are kept.
    """
    from .._io.occupied import BASIS, CLUSTERS
    from ..basis.overwriting import Planned, check_target

    earlier = earlier_record(out)
    record = json.loads(json.dumps(options.record(), default=str))
    same = (
        earlier.get("fingerprint") == earlier_record(again).get("fingerprint")
        if again is not None
        else earlier.get("build") == record
        and (earlier.get("precision") or {}).get("stored", "float32") == inputs.get("precision", "float32")
        and _names(sources) in (None, _names([entry.get("location") for entry in earlier.get("sources") or []]))
    )
    clusters = inputs.get("clusters") is not None
    planned = Planned(CLUSTERS, certain=False) if clusters else Planned(BASIS, certain=not same)
    given = [each.get("model") if isinstance(each, dict) else each for each in sources or []]
    check_target(out, planned, overwrite=force, inputs=[*given, again, inputs.get("like")])


def _names(sources: list[Any] | None) -> list[str] | None:
    """Return the last parts of places, sorted; None where some of them stand for several sources, or are none."""
    places = [each.get("model") if isinstance(each, dict) else each for each in sources or []]
    if any(not isinstance(each, str) or each.endswith(".txt") or set(each) & set("*?[:@") for each in places):
        return None
    return sorted(Path(each).name for each in places)


def _opened(request: Request) -> dict[str, Any]:
    """Return the arguments of builds and plans alike, with models and bases loaded."""
    from ..basis import SubspaceBasis
    from ..builders.build_file import open_sources

    model = base_model(request.inputs.get("base_model"))
    common: dict[str, Any] = {"base_model": model, "resources": request.resources}
    if request.again is not None:
        old, precision = SubspaceBasis.from_pretrained(request.again), request.inputs.get("precision")
        if old.precision is not None and precision not in (None, old.precision):
            raise SubspaceError(
                f"precision={precision!r}: {request.again} is stored as {old.precision}, and is built again as that."
                " --config takes the same record as a beginning, with another precision."
            )
        return {"basis": old, **common}
    sources = request.sources
    if sources is not None:
        sources = open_sources(sources, allow_bin=request.options.allow_bin, base_model=model)
    like = request.inputs.get("like")
    if like is not None:
        common["like"] = SubspaceBasis.from_pretrained(like)
    return {"sources": sources, "options": request.options, **common}


def _made(request: Request) -> tuple[SubspaceBasis | Clusters, str]:
    """Build; returns the basis or bases, and how a basis that was built again compares with the one on record."""
    from ..builders import build_basis, build_clusters, rebuild_basis

    given, precision = _opened(request), request.inputs.get("precision")
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

    given = _opened(request)
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
