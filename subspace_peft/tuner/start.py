"""Where a task's training starts: at zero, at the fleet's mean, or at the projection of one of its sources."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..basis import ModuleBasis, SubspaceBasis
from ..errors import SubspaceError
from .config import SubspaceConfig


def check_start(config: SubspaceConfig, basis: SubspaceBasis | None, first: str) -> None:
    """Check that a task can start where its configuration says.

    Args:
        config: the task's.
        basis: its basis; None where that is in a saved task's own file.
        first: name of one of the basis's modules.

    Raises:
        SubspaceError: the basis has no mean core, no such source, or no sources' cores; names what to do.
    """
    if config.start == "zero" or (config.start == "mean" and config.mean_gain != "none"):
        return
    if basis is None:
        raise SubspaceError(
            f"start={config.start!r}: the basis is in a saved task's own file, which has no more of it than that task"
            " used. Give the whole basis, config.on_basis(basis), or start at 'zero'."
        )
    if config.start == "mean":
        if basis[first].M is None:
            raise SubspaceError(
                f"start='mean': the basis has no mean core (builder {basis.info.get('builder')!r}). Use a basis built"
                " from adapters, or start='zero'."
            )
        return
    source_index(config, basis)
    if basis[first].cores is None:
        raise SubspaceError(
            f"start={config.start!r}: this basis does not keep its sources' cores. Build it with keep_cores=True,"
            " or start at 'zero' or 'mean'."
        )


def source_index(config: SubspaceConfig, basis: SubspaceBasis) -> int:
    """Return the place of the source that `config.start` names in the basis's list of sources.

    Raises:
        SubspaceError: the basis has no such source; lists those that it has.
    """
    names = [source.get("name") for source in basis.info.get("sources", [])]
    if config.start not in names:
        raise SubspaceError(
            f"start={config.start!r}: no such source in the basis; choose 'zero', 'mean' or one of "
            f"{', '.join(map(str, names)) or '(it has none)'}."
        )
    return names.index(config.start)


def start_of(
    config: SubspaceConfig, basis: SubspaceBasis | None, module: Callable[[], ModuleBasis]
) -> tuple[torch.Tensor | None, float]:
    """Return where a module's coefficients start, checked by `check_start`.

    Args:
        config: the task's.
        basis: its basis.
        module: gives the part of it that the task uses in the module; called only where that is needed.

    Returns:
        The core C (k_out, k_in) in units of ΔW, None for zero; and the mean core's gain, where it is trained.
    """
    if config.start == "zero" or (config.start == "mean" and config.mean_gain != "none"):
        return None, float(config.start == "mean")
    found = module()
    if config.start == "mean":
        return found.M, 0.0
    assert basis is not None and found.cores is not None
    core = found.cores[source_index(config, basis)]
    return (core - found.M if config.mean_gain == "fixed" else core), 0.0
