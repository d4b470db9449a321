"""``subspace-peft analyze`` and `report`. Imports happen inside."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from typing import TYPE_CHECKING

from .._io.progress import begin
from ..energy import FAITHFUL, percent
from ..errors import SubspaceError
from .common import Add, add_base_model_name, add_basis, add_force, add_json, add_reading, base_model, print_json
from .language import hints_in_flags
from .parsers import OUTPUT, SIZE, SOURCES, grouped

if TYPE_CHECKING:
    from ..report import FleetAnalysis


def add_analyze(add: Add) -> None:
    """Add the verb ``analyze``."""
    verb = add(
        "analyze",
        help="compare adapters with one another, and with a basis",
        description=(
            "Compare the updates of adapters: near-duplicates, shared seeds, outliers, and what a basis keeps of each."
            " -v shows every pair's cosine."
        ),
    )
    verb.add_argument("sources", nargs="+", metavar="ADAPTER", help="as for build")
    add_basis(verb, "folder or Hub id of a basis")
    add_base_model_name(verb)
    add_reading(verb)
    add_json(verb)
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
    verb.add_argument("basis", metavar="BASIS", help="folder or Hub id")
    grouped(verb, SOURCES).add_argument(
        "--fleet",
        nargs="+",
        metavar="ADAPTER",
        help="as for build; default: the basis's own sources, where they still are",
    )
    size = grouped(verb, SIZE)
    size.add_argument(
        "--sample", type=int, default=64, metavar="N", help="measure at most so many adapters (default: %(default)s)"
    )
    size.add_argument(
        "--modules", type=int, metavar="N", help="measure so many modules (default: all, 16 where ranks are many)"
    )
    size.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample, the folds and the noise")
    add_base_model_name(verb)
    add_reading(verb)
    output = grouped(verb, OUTPUT)
    output.add_argument(
        "--out", default="basis-report", metavar="PLACE", help="a folder, or a file.html (default: %(default)s)"
    )
    output.add_argument(
        "--files", action="store_true", help="write report.json, tables as CSV and figures as PNG beside the page"
    )
    add_force(verb, "such as a report on another basis")
    add_json(verb)
    verb.set_defaults(run=report)


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
    if any(entry.get("energy_kept", 1.0) < FAITHFUL for entry in found.sources):
        print(
            "What the basis leaves of an adapter can go into directions of its own: `subspace-peft report"
            f" {args.basis} --fleet …` says how many each needs, and `project --extra-rank` makes them."
        )
    if args.verbose:
        _say_cosines(found)
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
        raise SubspaceError("A report's figures need matplotlib: pip install subspace-peft[report].")
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
    begin("writing the report")
    page = found.save(args.out, files=args.files, overwrite=args.force)
    if args.json:
        return print_json({"page": str(page), **found.to_dict()})
    for line in found.verdict:
        print(hints_in_flags(line, args.flags))
    if found.skipped:
        print(f"{len(found.skipped)} adapters were not used; the page says why.")
    print(page)
    return 0


def _say_cosines(found: FleetAnalysis) -> None:
    """Print the cosine of every pair of adapters."""
    names = [entry["name"] for entry in found.sources]
    for i, one in enumerate(names):
        for j in range(i):
            print(f"  {names[j]}, {one}: cosine {found.cosines[i][j]:.3f}")
