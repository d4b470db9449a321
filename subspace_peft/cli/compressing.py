"""``subspace-peft compress``. Imports happen inside."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from .._lazy import collecting_later
from ..energy import percent
from .common import (
    DTYPES,
    Add,
    add_base_model_name,
    add_basis,
    add_force,
    add_json,
    add_no_base_check,
    add_out,
    add_reading,
    base_model,
    print_json,
    said_of_conversion,
)
from .flags import numbered
from .language import Flags, hints_in_flags
from .parsers import SIZE, SOURCES, STORED, grouped

if TYPE_CHECKING:
    from ..bundle.compression_report import CompressedAdapter, CompressionReport, Storage


def add_compress(add: Add) -> None:
    """Add the verb ``compress``."""
    verb = add(
        "compress",
        help="turn a fleet of LoRAs into a bundle",
        description=(
            "Project LoRAs on a basis and pack them into one bundle. Says how much of each is kept, which are refused,"
            " and what that saves; -v shows every adapter and module."
        ),
    )
    verb.add_argument(
        "loras",
        nargs="+",
        metavar="LORA",
        help="LoRA folder or file, Hub id with @revision, pattern, list.txt or collection",
    )
    add_basis(verb, "folder or Hub id of the basis", required=True)
    grouped(verb, SOURCES).add_argument(
        "--skip-bad", action="store_true", help="leave refused adapters out, each with its reason"
    )
    size = grouped(verb, SIZE)
    size.add_argument(
        "--min-energy",
        default="0.5",
        metavar="SHARE",
        help=(
            "refuse an adapter of whose energy (the squared Frobenius norm of its update) less than this share is"
            " kept, residual and all (default: %(default)s)"
        ),
    )
    size.add_argument(
        "--residual",
        type=int,
        default=0,
        metavar="RANK",
        help="below the threshold, keep a residual of up to this rank (1 to 4 are usual)",
    )
    grouped(verb, STORED).add_argument(
        "--dtype", default="float32", choices=DTYPES, help="of the stored parameters (default: %(default)s)"
    )
    add_no_base_check(verb)
    add_base_model_name(verb)
    add_reading(verb)
    add_out(verb, "the bundle's folder", required=True)
    add_force(verb)
    add_json(verb)
    verb.set_defaults(run=compress)


def compress(args: Namespace) -> int:
    """Turn a fleet of LoRAs into a bundle."""
    with collecting_later():
        import torch

    from ..bundle import compress_fleet

    report = compress_fleet(
        args.loras,
        args.basis,
        args.out,
        min_energy=numbered(args.min_energy, "--min-energy"),
        residual=args.residual,
        skip_bad=args.skip_bad,
        check_base_model=not args.no_base_check,
        base_model_name=args.base_model_name,
        dtype=getattr(torch, args.dtype),
        overwrite=args.force,
        progress=not args.quiet,
        allow_bin=args.allow_bin,
        base_model=base_model(args.base_model),
    )
    if args.json:
        return print_json(report.to_dict())
    if args.verbose:
        _say_adapters(report)
    _say_summary(report, args.flags)
    print(storage_table(report.storage))
    return 0


def _say_summary(report: CompressionReport, flags: Flags) -> None:
    """Say how many adapters are in the bundle, which are not and why, and which is kept worst."""
    from ..bundle.compression_report import reason_of

    kept = [each for each in report.adapters if each.total is not None and not each.refused]
    refused = [each for each in report.adapters if each not in kept]
    print(f"{len(report.adapters)} adapters: {len(kept)} in {report.folder}, {len(refused)} refused")
    for each in refused:
        # some reasons name files, whose names may hold anything
        reason = reason_of(each).replace(f"min_energy={report.min_energy}:", f"--min-energy {report.min_energy}:")
        print(f"  left out: {hints_in_flags(reason, flags)}")
    worst = min(kept, key=lambda each: each.total.kept + each.total.residual, default=None)
    if worst is not None:
        print(_said(worst) if len(kept) == 1 else f"worst: {_said(worst)}; -v shows all")


def _say_adapters(report: CompressionReport) -> None:
    """Say of every adapter, and of each of its modules, what is kept, what a residual adds, and what is lost."""
    for each in report.adapters:
        if each.refused or each.total is None:
            continue
        print(_said(each))
        for module, share in each.modules.items():
            print(f"  {percent(share.kept):>7}  {percent(share.residual):>7}  {percent(share.lost):>7}  {module}")


def _said(each: CompressedAdapter) -> str:
    rank = f" in a residual of rank {each.residual_rank}" if each.residual_rank else ""
    alone = ", the projection alone" if each.residual_rank else ""
    how = said_of_conversion(each.converted_from, each.lost_in_conversion)
    return (
        f"{each.name}: energy kept {percent(each.total.kept)}, residual {percent(each.total.residual)}{rank}, lost"
        f" {percent(each.total.lost)} ({each.verdict}{alone}){how}"
    )


def storage_table(storage: Storage) -> str:
    """Return the storage report in a few lines."""
    plural = "" if storage.break_even == 1 else "s"
    even = "never" if storage.break_even is None else f"from {storage.break_even:,} adapter{plural} on"
    rows = [
        (f"{storage.adapters:,} adapters before", storage.before),
        ("basis", storage.basis),
        ("bundle", storage.bundle),
        ("basis and bundle", storage.after),
        ("an adapter before", round(storage.per_adapter_before)),
        ("an adapter in the bundle", round(storage.per_adapter_after)),
    ]
    lines = [f"{title:<28}{size:>16,} bytes" for title, size in rows]
    return "\n".join([*lines, f"{'smaller in all':<28}{even}"])
