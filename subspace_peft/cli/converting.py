"""``subspace-peft project`` and `export-lora`. Imports happen inside."""

from __future__ import annotations

from argparse import BooleanOptionalAction, Namespace

from .._shown import said_of_directions
from ..builders.option_checks import number
from ..energy import percent
from .common import (
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
    refuse_idle,
    said_of_conversion,
)
from .parsers import SIZE, SOURCES, STORED, grouped


def add_project(add: Add) -> None:
    """Add the verb ``project``."""
    verb = add(
        "project",
        help="turn a LoRA into coefficients",
        description=(
            "Project a LoRA on a basis and say how much of its energy (the squared Frobenius norm of its update) the"
            " basis keeps. With --out the coefficients are written as a task, which PEFT loads; with --extra-rank or"
            " --extra-budget what the basis lacks goes along, in directions of the task's own."
        ),
    )
    verb.add_argument("lora", metavar="LORA", help="LoRA folder, or Hub id with @revision")
    add_basis(verb, "folder or Hub id of the basis", required=True)
    grouped(verb, SOURCES).add_argument(
        "--part", help="of a pipeline's basis the part that the LoRA is of, where names do not tell"
    )
    add_no_base_check(verb)
    add_base_model_name(verb)
    add_reading(verb)
    size = grouped(verb, SIZE)
    size.add_argument("--extra-rank", type=int, help="directions of the task's own per module, for what is not kept")
    size.add_argument(
        "--extra-budget",
        type=int,
        metavar="N",
        help="parameters of all own directions together, given to the modules where they keep most",
    )
    add_out(verb, "write the coefficients as a task")
    add_force(verb)
    add_json(verb)
    verb.set_defaults(run=project)


def add_export_lora(add: Add) -> None:
    """Add the verb ``export-lora``."""
    verb = add(
        "export-lora",
        help="turn a task into a stock PEFT LoRA",
        description=(
            "Write a task as a stock PEFT LoRA folder, which needs neither this package nor the basis. The LoRA is the"
            " task itself, exact up to rounding; only --rank truncates it."
        ),
    )
    verb.add_argument("task", metavar="TASK", help="folder or Hub id of a task")
    add_basis(verb, "where the basis is, if not where the task says")
    grouped(verb, SOURCES).add_argument("--part", help="with --format diffusers: the part of a pipeline, such as unet")
    size = grouped(verb, SIZE)
    size.add_argument("--rank", type=int, help="truncate to this rank")
    size.add_argument("--pad-to", metavar="RANK", help="fill up to this rank with zeros, or 'vllm'")
    stored = grouped(verb, STORED)
    stored.add_argument(
        "--format", default="peft", help="'peft', a folder (default), or 'diffusers', a file that pipelines load"
    )
    stored.add_argument(
        "--modules-to-save",
        action=BooleanOptionalAction,
        help="whether classifiers and the like go along (default: yes, but not with --pad-to vllm)",
    )
    add_out(verb, "the LoRA's folder", required=True)
    add_force(verb)
    add_json(verb)
    verb.set_defaults(run=export_lora)


def project(args: Namespace) -> int:
    """Project a LoRA on a basis."""
    from .._io.occupied import TASK
    from ..basis import SubspaceBasis
    from ..basis.overwriting import Planned, check_target
    from ..convert import project_lora

    if args.out is None:
        refuse_idle(args, "--force", "without --out: nothing is written")
    basis = SubspaceBasis.from_pretrained(args.basis)
    if args.out:
        planned = Planned(TASK, basis.fingerprint)
        check_target(args.out, planned, overwrite=args.force, inputs=[args.lora], needed=[args.basis])
    projection = project_lora(
        args.lora,
        basis,
        check_base_model=not args.no_base_check,
        base_model_name=args.base_model_name,
        allow_bin=args.allow_bin,
        base_model=base_model(args.base_model),
        part=args.part,
        extra_rank=args.extra_rank,
        extra_budget=args.extra_budget,
    )
    facts = projection.to_dict()
    if args.out:
        facts["out"] = str(projection.save_pretrained(args.out, overwrite=args.force))
        if len(projection.parts) > 1:
            facts["parts"] = list(projection.parts)
    if args.json:
        return print_json(facts)
    if args.verbose:
        own = projection.energy_own if projection.own else {}
        for name, share in projection.energy.items():
            more = f"  {percent(own[name]):>7} in {projection.own_directions[name]} of its own" if own else ""
            print(f"  {percent(share):>7}{more}  {name}")
    more = ""
    if projection.own:
        more = (
            f", {percent(projection.energy_with_own)} with own directions"
            f" ({said_of_directions(projection.own_directions)}, {projection.own_parameters:,} parameters)"
        )
    print(
        f"energy kept {percent(projection.energy_kept)} (random directions {percent(projection.energy_random)}){more},"
        f" relative error {projection.relative_error:.3f}: {projection.verdict}"
        f"{said_of_conversion(projection.source.converted, projection.source.lost)}"
    )
    return 0


def export_lora(args: Namespace) -> int:
    """Write a task as a stock LoRA."""
    from ..convert import export_lora as export

    pad = args.pad_to if args.pad_to in (None, "vllm") else number(args.pad_to)
    result = export(
        args.task,
        args.out,
        basis=args.basis,
        rank=args.rank,
        pad_to=pad,
        modules_to_save=args.modules_to_save,
        overwrite=args.force,
        format=args.format,
        part=args.part,
    )
    if args.json:
        return print_json(result.to_dict())
    print(
        f"{result.folder}: LoRA r={result.rank} for {result.modules} modules, {result.bytes:,} bytes, "
        f"{percent(result.energy_kept)} of the update's energy"
    )
    return 0
