"""The plan that `--dry-run` prints: downloads, steps and sizes, from a model on the meta device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from subspace_peft.errors import SubspaceError
from subspace_peft.tuner.coefficients import make_coefficients
from subspace_peft.tuner.targets import sizes, supported

from .arguments import CommonArguments
from .methods import CORE_RATES, HEAD_RATES, LORA_RATES, MEAN_RATES, VERA_RATES, own_name


def planned_numbers(
    model: nn.Module,
    *,
    target_modules: Sequence[str] | str,
    layers: Sequence[int] | None = None,
    layers_pattern: str | None = None,
    k: int,
    coefficients: str = "core",
    r: int = 8,
    directions: int = 0,
    mean_gain: str = "none",
    extra_rank: int = 0,
    own: Sequence[int] = (),
    head: str | None = "classifier",
) -> dict[str, Any]:
    """Return the trained parameters per row of `methods` and `candidates`, and the bytes of the basis.

    Args:
        model: the base model with its head; on the meta device it costs no memory.
        target_modules, layers, layers_pattern, coefficients, r, mean_gain, extra_rank: as in `methods`.
        k: of the basis; a smaller layer has as many directions as its own side.
        own: as in `candidates`.
        directions: of the basis, for the `directions` coefficients.
        head: the head's name, or a part of it; None where there is none.

    Returns:
        ``modules`` (how many are adapted), ``parameters`` (of the whole model), ``head``, ``basis_bytes`` (U, V and M
        in float32), and ``rows``: method → parameters of its adapter.

    Raises:
        SubspaceError: `target_modules` matches no linear layer.
    """
    given = target_modules if isinstance(target_modules, str) else list(target_modules)
    where = {"layers_to_transform": list(layers), "layers_pattern": layers_pattern} if layers else {}
    config = LoraConfig(target_modules=given, **where)
    shapes = [
        sizes(module)
        for name, module in model.named_modules()
        if supported(module) and check_target_module_exists(config, name)
    ]
    if not shapes:
        raise SubspaceError(
            f"target_modules={target_modules!r}{f' in layers {list(layers)}' if layers else ''} match no linear layer"
            f" of {type(model).__name__}. Name modules that it has; `print(model)` lists them."
        )

    def inside(kind: str, gain: str, own: int = 0) -> int:
        total = 0
        for out, inner in shapes:
            made = make_coefficients(
                kind,
                min(k, out),
                min(k, inner),
                r=r,
                directions=directions,
                mean_gain=gain,
                own=(out, inner, min(own, out, inner)),
            )
            total += sum(parameter.numel() for parameter in made.parameters())
        return total

    rows = {
        ("base model" if head is None else "head only"): 0,
        "mean only": inside("none", "trainable"),
        f"LoRA r={r}": sum(r * (out + inner) for out, inner in shapes),
        "VeRA": sum(out + 256 for out, _ in shapes),
    }
    if coefficients != "none":
        rows |= {
            "random basis": inside(coefficients, "none", extra_rank),
            "this basis": inside(coefficients, mean_gain, extra_rank),
        }
    rows |= {own_name(count): inside(coefficients, mean_gain, count) for count in own}
    return {
        "modules": len(shapes),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "head": sum(p.numel() for name, p in model.named_parameters() if head is not None and head in name),
        "basis_bytes": 4 * sum(min(k, o) * o + min(k, i) * i + min(k, o) * min(k, i) for o, i in shapes),
        "rows": rows,
    }


def steps_of(examples: int, batch: int, epochs: float) -> int:
    """Return the optimizer steps of the stock Trainer on one device."""
    return math.ceil(math.ceil(examples / batch) * epochs)


def runs_of(args: CommonArguments, *, head: bool = True) -> int:
    """Return the number of training runs of `--stage compare`, or of `choose`, sweeps that are not widened."""
    if args.stage == "choose":
        sweeps = [*[CORE_RATES] * (1 + len(args.own)), LORA_RATES]
        return sum(min(len(s), args.sweep) if args.sweep > 0 else len(s) for s in sweeps)
    sweeps = [MEAN_RATES, LORA_RATES, VERA_RATES, *([HEAD_RATES] if head else [])]
    sweeps += [CORE_RATES] * 2 if args.coefficients != "none" else []
    return sum((min(len(s), args.sweep) if args.sweep > 0 else len(s)) + len(args.seeds) for s in sweeps)


def planned_steps(
    args: CommonArguments, known: Mapping[str, Mapping[str, Any]], *, head: bool = True
) -> dict[str, int]:
    """Return the optimizer steps of each stage.

    They are per 1,000 training examples where neither the arguments nor `known`, task → ``train`` (how many it has),
    say how many there are.
    """
    own = [name for name in args.sources if "/" not in name]
    budgets = {f"source {name}": (name, args.source_examples, args.source_epochs) for name in own}
    budgets["train"] = (args.task, args.train_examples, args.epochs)
    steps = {}
    for stage, (name, most, epochs) in budgets.items():
        least = [count for count in (known.get(name, {}).get("train"), most) if count]
        steps[stage if least else f"{stage}, per 1,000 examples"] = steps_of(
            min(least, default=1000), args.batch, epochs
        )
    # the last one is the held-out task's
    each, runs = list(steps)[-1], runs_of(args, head=head)
    stage = "choose" if args.stage == "choose" else "compare"
    return steps | {each.replace("train", f"{stage}, {runs} runs"): steps[each] * runs}


def dry_run(
    args: Any,
    known: Mapping[str, Mapping[str, Any]],
    *,
    data: Sequence[str],
    empty: Callable[[Any], nn.Module],
    default: Any = None,
    head: str | None,
) -> None:
    """Print what would be fetched, trained and written.

    Args:
        args: the recipe's, whose `target_modules` may be set by `empty`.
        known: task → ``train``, how many training examples it has.
        data: Hub ids of the data.
        empty: makes the model with its head from a configuration, on the meta device.
        default: the configuration, where that of `args.model` is not on this machine; None: sizes are not known.
        head: see `planned_numbers`.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(args.model, local_files_only=True)
    except (OSError, ValueError):
        config = default
    with torch.device("meta"):
        model = None if config is None else empty(config)
    weight = ""
    if model is not None:
        size = (getattr(config, "dtype", None) or torch.float32).itemsize
        weight = f", about {size * sum(parameter.numel() for parameter in model.parameters()):,} bytes"
    fetched = [f"model {args.model}{weight}"] if not Path(args.model).is_dir() else []
    fetched += [f"data {name}" for name in data]
    fetched += [f"adapter {name}" for name in args.sources if "/" in name and not Path(name).is_dir()]
    fetched += [f"basis {args.basis}"] if args.basis and not Path(args.basis).is_dir() else []
    steps = planned_steps(args, known, head=head is not None)
    where = {"target_modules": args.target_modules, "layers": args.layers}
    print_plan(args, fetched, steps, model, head=head, **where)


def print_plan(
    args: CommonArguments,
    downloads: Sequence[str],
    steps: Mapping[str, int],
    model: nn.Module | None,
    *,
    head: str | None = "classifier",
    **where: Any,
) -> None:
    """Print what `--dry-run` promises.

    Args:
        args: the recipe's.
        downloads: each thing that would be fetched; empty where all is local.
        steps: stage → optimiser steps.
        model: the base model with its head, on the meta device; None where its shape is not known without fetching it.
        head: see `planned_numbers`.
        where: `target_modules`, `layers`, `layers_pattern`.
    """
    print("Would fetch:")
    for each in downloads or ["nothing: all of it is here"]:
        print(f"  {each}")
    print("Would train, in steps:")
    for stage, count in steps.items():
        print(f"  {stage}: {count:,}")
    if model is None:
        print("Trained parameters: not known yet, since the base model's configuration is not on this machine.")
        return
    plan = planned_numbers(
        model,
        k=min(args.k or args.basis_k, args.basis_k),
        coefficients=args.coefficients,
        r=args.r,
        head=head,
        directions=args.directions,
        mean_gain=args.mean_gain,
        extra_rank=args.extra_rank,
        own=args.own if args.stage == "choose" else (),
        **where,
    )
    basis = planned_numbers(model, k=args.basis_k, head=head, **where)["basis_bytes"]
    print(
        f"Trained parameters and float32 bytes, on {plan['modules']} modules of a model of {plan['parameters']:,}"
        " parameters:"
    )
    for name, count in plan["rows"].items():
        print(f"  {name}: {count:,} = {4 * count:,} bytes")
    if head is not None:
        print(f"  and with each of them the head: {plan['head']:,} = {4 * plan['head']:,} bytes")
    print(f"The basis, once for all tasks: about {basis:,} bytes.")
