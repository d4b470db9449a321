"""What a bank takes of a task, and the task that it gives back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import BasisMismatchError, SubspaceError
from ..tuner.base_check import require_same_base
from ..tuner.config import SubspaceConfig
from ..tuner.own_directions import own_fields
from ..tuner.renaming import without_wrappers
from .bank_rows import Pair
from .read import SavedTask, read_task
from .write import PREFIX


def taken(model: nn.Module, config: SubspaceConfig, name: str, task: Any, hub: dict[str, Any]) -> SavedTask:
    """Read a task that a bank is to hold.

    Args:
        model: The bank's.
        config: Of the adapter that the bank was made for.
        name: The task's name in the bank.
        task: See `TaskBank.add`.
        hub: See there.

    Raises:
        BasisMismatchError: It is on another basis.
        SubspaceError: It has trained modules that a bank cannot serve.
    """
    read = read_task(model, adapter_name=name) if task is None else read_task(task, **hub)
    if read.config.basis_fingerprint != config.basis_fingerprint:
        raise BasisMismatchError(
            f"Task {name!r} is on the basis {read.config.basis_fingerprint}, this bank's tasks on"
            f" {config.basis_fingerprint}. Make a bank of its own for it."
        )
    require_same_base(read.config, config, f"Task {name!r}")
    if read.extras:
        whole = sorted({key.removeprefix(PREFIX).rpartition(".")[0] for key in read.extras})
        how = f"Load it as an adapter, `model.load_adapter({str(task)!r}, {name!r})`"
        raise SubspaceError(
            f"Task {name!r} has trained {', '.join(whole[:3])} whole as well, which a bank does not hold."
            f" {'It is an adapter of this model already' if task is None else how}: rows of the same batches name it"
            " as they name the bank's tasks, and get its own modules."
        )
    return read


def instead_of_room(name: str, task: Any) -> str:
    """Return what else helps where a bank lacks room for a task's own directions, as the end of a sentence.

    Args:
        name: The task's name in the bank.
        task: See `TaskBank.add`.
    """
    rows = "rows of the same batches name it as they name the bank's tasks"
    if task is None:
        there = f"or use the adapter that the model has by the name {name!r}: {rows}."
        return f"add its projection on the basis, `read_task(model, adapter_name={name!r}).without_own()`, {there}"
    if isinstance(task, SavedTask):
        return "or add its projection on the basis, by its method `without_own()`."
    if isinstance(task, Mapping):
        return "or give own= fewer: `read_task(task).without_own()` is a saved task's projection on its basis."
    return (
        f"add its projection on the basis, `read_task({str(task)!r}).without_own()`, or load it as an adapter of the"
        f" model, `model.load_adapter({str(task)!r}, {name!r})`: {rows}."
    )


def task_of(config: SubspaceConfig, cores: dict[str, torch.Tensor], own: dict[str, Pair]) -> SavedTask:
    """Return a task with `core` coefficients and without its part of the basis.

    Args:
        config: Of the adapter that the bank was made for.
        cores: Module → (k_out, k_in) float64, in units of ΔW.
        own: Module → ``(B, A)``, (out, φ) and (φ, in) float64; only of modules where the task has any.
    """
    made = dataclasses.replace(
        without_wrappers(config),
        coefficients="core",
        # the rank of factors, which a dense core has none of
        r=SubspaceConfig.r,
        mean_gain="none",
        start="zero",
        subspace_version=None,
        basis_modules=None,
        card=None,
        target_modules=set(cores),
        modules_to_save=None,
        **own_fields({module: len(own[module][1]) if module in own else 0 for module in cores}),
    )
    return SavedTask(made, cores, {}, {}, own)
