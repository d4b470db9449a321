"""Read a task in a basis as a source adapter: its update in factored form, core and own directions together."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..basis.module import tensor_bytes
from ..errors import HubUnavailableError, SourceError, SubspaceError
from .lora import method_of
from .source import Source

if TYPE_CHECKING:
    from ..tasks.read import SavedTask

SIDES = ("B", "A")


def is_saved_task(reference: Any) -> bool:
    """Return whether `reference` is a `SavedTask`; without an import of PEFT where none can be."""
    tasks = sys.modules.get(f"{__package__.rpartition('.')[0]}.tasks.read")
    return tasks is not None and isinstance(reference, tasks.SavedTask)


def is_task(reference: Any) -> bool:
    """Return whether `reference` is a task in memory: a `SavedTask`, or a model whose active adapter is one."""
    if is_saved_task(reference):
        return True
    config = getattr(reference, "peft_config", None)
    active = getattr(reference, "active_adapters", None)
    if not isinstance(config, dict) or active is None:
        return False
    names = active() if callable(active) else active
    names = [names] if isinstance(names, str) else list(names)
    return len(names) == 1 and method_of(vars(config[names[0]]) if names[0] in config else {}) == "SUBSPACE"


def task_source(reference: Any, location: str, name: str = "task", **of_files: Any) -> Source:
    """Return the `Source` of a task, whose factors are made when they are asked for.

    A module's ``ΔW = U C V + B A`` has the factors ``[U P S | B]`` and ``[Qᵀ V; A]`` with the SVD ``C = P S Qᵀ``, so
    that no two tasks share rows because they share V, as LoRAs that began from one A do.

    Args:
        reference: the task, as `read_task` takes it.
        location: of the source.
        name: of the source.
        of_files: further fields of the source, where it was read from files.

    Raises:
        SourceError: it cannot be read, or its basis is nowhere.
        HubUnavailableError: the Hub does not answer.
    """
    from ..tasks.read import read_task

    try:
        task = read_task(reference)
    except HubUnavailableError:
        raise
    except SubspaceError as error:
        raise SourceError(f"{location}: {error}") from error
    keys = {module: {side: f"{module}.{side}" for side in SIDES} for module in task.cores}
    return Source(
        name,
        location,
        task.config.to_dict(),
        keys,
        _reader(task),
        "" if of_files.get("file") is not None else _digest(task),
        other_keys=tuple(sorted(task.extras)),
        scales=dict.fromkeys(keys, 1.0),
        scale_from="folded into the factors of a task in a basis",
        shapes=_shapes(task),
        task=task,
        **of_files,
    )


def _reader(task: SavedTask) -> Callable[[str], torch.Tensor]:
    """Return key → tensor of a task's factors, float32; both of the module asked for last are kept."""
    held: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def read(key: str) -> torch.Tensor:
        module, _, side = key.rpartition(".")
        if module not in held:
            held.clear()
            basis = task.modules[module]
            P, S, Qt = torch.linalg.svd(task.cores[module], full_matrices=False)
            B, A = basis.U.double() @ (P * S), Qt @ basis.V.double()
            if (own := task.own.get(module)) is not None:
                B, A = torch.cat([B, own[0].double()], 1), torch.cat([A, own[1].double()])
            held[module] = B.float(), A.float()
        return held[module][SIDES.index(side)]

    return read


def _shapes(task: SavedTask) -> dict[str, tuple[int, ...]]:
    """Return key → shape of a task's factors; of a stored basis no tensor is read for it."""
    found: dict[str, tuple[int, ...]] = {}
    for module, core in task.cores.items():
        own = task.own.get(module)
        rank = min(core.shape) + (0 if own is None else own[0].shape[1])
        out, size = task.out_in(module)
        found |= {f"{module}.B": (out, rank), f"{module}.A": (rank, size)}
    return found


def _digest(task: SavedTask) -> str:
    """Return the sha256 of a task in memory: of its basis, its cores and its own directions."""
    digest = hashlib.sha256(str(task.config.basis_fingerprint).encode())
    for module in sorted(task.cores):
        for value in (task.cores[module], *task.own.get(module, ())):
            digest.update(f"{module}:{list(value.shape)};".encode())
            digest.update(tensor_bytes(value))
    return digest.hexdigest()
