"""``subspace-peft update`` without new adapters: a basis's directions merged into fewer, for the tasks on it."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from .._io.progress import begin
from ..builders.options import Resources, UpdateOptions
from ..errors import SubspaceError
from .common import refuse_idle
from .flags import given_options
from .migrating import LISTED, Carried

USED = ("k", "k_in", "alternations", "max_drift")


def check_merging(args: Namespace) -> None:
    """Raise `SubspaceError` where there is neither an adapter nor what merging needs, or a flag would do nothing."""
    if args.k is None or not args.tasks:
        raise SubspaceError(
            "Name the adapters that the basis is to grow by; or give -k and --tasks, to merge its directions into"
            " fewer for the tasks on it."
        )
    why = "without new adapters: directions are merged for --tasks alone"
    for kind in (UpdateOptions, Resources):
        for name in given_options(args, kind):
            if name not in (*USED, "progress"):
                refuse_idle(args, f"--{name.replace('_', '-')}", why)
    refuse_idle(args, "--base-model", why)
    refuse_idle(args, "--no-pad", "with -k: tasks move to other directions")


def merge(old: Any, tasks: Carried, options: UpdateOptions, bound: float, *, say: bool, verbose: int) -> Any:
    """Return the basis with fewer directions; says first what each task loses at most.

    Args:
        old: The basis.
        tasks: The tasks on it.
        options: Of which `k`, `k_in` and `alternations` count.
        bound: Largest share of the norm of a task's update that may change in a module.
        say: Whether to print the plan.
        verbose: How much of it.

    Raises:
        SubspaceError: A task would lose more than that; or no module has more directions than asked for.
    """
    from ..builders import plan_refit, refit_basis

    begin("fitting fewer directions")
    assert options.refit is not None
    plan = plan_refit(old, tasks.read(), options.refit, alternations=options.alternations)
    if not plan.modules:
        has = old.describe_k().removeprefix("k=")
        raise SubspaceError(f"k={options.k} leaves nothing to merge: every module has {has} directions or fewer.")
    if say:
        worst = {name: max(each, key=each.__getitem__) for name, each in plan.drift.items()}
        names = list(worst) if verbose or len(worst) <= LISTED else [plan.worst[0]]
        print(f"{len(plan.modules)} of {len(old)} modules are fitted again; of {len(worst)} tasks' updates is lost:")
        for name in names:
            print(f"  {name}: at most {plan.drift[name][worst[name]]:.1e} of the norm in a module ({worst[name]})")
        if len(names) < len(worst):
            print("  which is the most; -v shows each")
    return refit_basis(plan, max_drift=bound)
