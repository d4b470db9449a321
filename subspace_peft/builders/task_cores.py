"""The cores of tasks on a basis, by the basis's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..basis import ModuleBasis, SubspaceBasis
from ..basis.transfer import Transfer
from ..errors import SubspaceError


class TaskCores:
    """A task's cores by the basis's names, padded to its sizes.

    Args:
        name: For messages.
        task: As `read_task` takes it, or its cores: module → (k_out, k_in), in units of ΔW.
        basis: The basis.

    Attributes:
        cores: Module of the basis → (k_out, k_in) float64.
        names: Module of the basis → the task's name for it.
        own: Module of the basis → ``(B, A)`` of the task's own directions.
    """

    def __init__(self, name: str, task: Any, basis: SubspaceBasis) -> None:
        cores, own, config = task, {}, None
        if not (isinstance(task, Mapping) and all(isinstance(each, torch.Tensor) for each in task.values())):
            from ..tasks.read import read_task

            found = read_task(task)
            cores, own, config = found.cores, found.own, found.config
        if config is not None and config.basis_fingerprint not in (None, basis.fingerprint):
            raise SubspaceError(
                f"Task {name!r} is on the basis {config.basis_fingerprint}, and this one is"
                f" {basis.fingerprint}. Migrate it first: `migrate_task(task, basis)` (`subspace-peft migrate`)."
            )
        names = basis.named((config.basis_names if config is not None else None) or {})
        self.cores = by_basis_name(names, cores, f"task {name!r}")
        self.names = {str(names.find(each)): each for each in cores}
        self.own = {str(names.find(each)): pair for each, pair in own.items()}
        if wrong := [key for key, core in self.cores.items() if not bool(torch.isfinite(core).all())]:
            raise SubspaceError(
                f"Task {name!r} holds NaN or infinite values in module {self.names[wrong[0]]!r}: its training"
                " diverged, or its file is damaged. Leave it out, or train it again."
            )

    def alive(self, key: str) -> bool:
        """Return whether the task changes a module by the basis's directions."""
        return key in self.cores and bool(self.cores[key].any())

    def norm(self, key: str, module: ModuleBasis) -> float:
        """Return ``‖ΔW‖_F`` of a module, the task's own directions included.

        Args:
            key: The module.
            module: As it is.
        """
        core, own = self.cores[key], self.own.get(key)
        return float(core.norm()) if own is None else Transfer(module, module, key).size(core, own)

    def loss(self, key: str, module: ModuleBasis, u: torch.Tensor, v: torch.Tensor) -> float:
        """Return ``‖C − u uᵀ C v vᵀ‖_F / ‖ΔW‖_F`` in a module.

        Args:
            key: The module.
            module: As it is.
            u: (w_out, k_out') float64, orthonormal: the new directions in coordinates of the old ones.
            v: (w_in, k_in') float64, orthonormal.
        """
        core, size = self.cores[key], self.norm(key, module)
        lost = float((core - u @ (u.T @ core @ v) @ v.T).norm())
        return lost / size if size else float("inf")


def by_basis_name(basis: SubspaceBasis, cores: Mapping[str, torch.Tensor], what: str) -> dict[str, torch.Tensor]:
    """Return a task's cores by the basis's names, padded to its sizes, in float64.

    Args:
        basis: The basis.
        cores: Module → core, of a task that uses all of its directions or the leading ones.
        what: Whose they are, for messages.

    Raises:
        SubspaceError: The basis does not have a module, or fewer directions.
    """
    shapes, found = basis.shapes(), {}
    for name, core in cores.items():
        key = basis.find(name)
        size = None if key is None else (shapes[key]["k_out"], shapes[key]["k_in"])
        if key is None or size is None or any(n > m for n, m in zip(core.shape, size, strict=True)):
            raise SubspaceError(
                f"{what}: module {name!r} has a core {tuple(core.shape)}, the basis {size or 'no such module'}. Give"
                " cores of tasks on this very basis."
            )
        padded = torch.zeros(size, dtype=torch.float64)
        padded[: core.shape[0], : core.shape[1]] = core
        found[key] = padded
    return found
