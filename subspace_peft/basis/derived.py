"""What a basis becomes when its directions are cut, cast to another dtype, or rounded to fewer bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import SubspaceError
from .module import ModuleBasis
from .precision import PRECISIONS, RoundedModules, reduced, summary
from .recorded_energy import moved_sources, rounded_info

Modules = Mapping[str, ModuleBasis]


def truncated(
    modules: Modules, info: Mapping[str, Any], fingerprint: str, k: int | tuple[int, int]
) -> tuple[dict[str, ModuleBasis], dict[str, Any]]:
    """Return the modules and the ``info`` of `SubspaceBasis.truncate`.

    Args:
        modules: of the basis.
        info: of the basis.
        fingerprint: of the basis.
        k: directions to keep on each side, or ``(k_out, k_in)``.

    Raises:
        SubspaceError: a size is below 1.
    """
    k_out, k_in = (k, k) if isinstance(k, int) else k
    cut = {name: module.truncate(k_out, k_in) for name, module in modules.items()}
    made = {**info, "truncated_from": fingerprint, "k": [k_out, k_in]}
    # the energies measured are those of the larger basis; of sources whose cores are stored they follow
    for key in ("measured", "precision"):
        made.pop(key, None)
    if "sources" in made:
        made["sources"] = moved_sources(info, modules, cut)
    return cut, made


def cast(
    modules: Modules, info: Mapping[str, Any], fingerprint: str, dtype: torch.dtype
) -> tuple[dict[str, ModuleBasis], dict[str, Any]]:
    """Return the modules and the ``info`` of `SubspaceBasis.to`.

    Args:
        modules: of the basis.
        info: of the basis.
        fingerprint: of the basis.
        dtype: a float dtype.
    """
    made = {
        name: ModuleBasis(**{key: value.to(dtype) for key, value in module.tensors().items()})
        for name, module in modules.items()
    }
    return made, {**{key: value for key, value in info.items() if key != "precision"}, "cast_from": fingerprint}


def rounded(
    modules: Modules, info: Mapping[str, Any], fingerprint: str, precision: str, stored_as: str | None
) -> tuple[RoundedModules, dict[str, Any]]:
    """Return the modules and the ``info`` of `SubspaceBasis.to_precision`.

    Args:
        modules: of the basis.
        info: of the basis.
        fingerprint: of the basis.
        precision: to store U and V in.
        stored_as: the precision that the basis has already, or None.

    Raises:
        SubspaceError: there is no such precision; the basis has a lower one already; rounding leaves a module too far
            from orthonormal.
    """
    if precision not in PRECISIONS:
        raise SubspaceError(f"There is no precision {precision!r}; choose one of {', '.join(PRECISIONS)}.")
    if stored_as is not None:
        raise SubspaceError(
            f"This basis is stored as {stored_as} already, and {precision} would round it twice. Take the"
            f" float32 basis it was made from, {info.get('precision', {}).get('of')}."
        )
    made = {name: reduced(module, precision, name) for name, module in modules.items()}
    found = RoundedModules(precision, {name: stored for name, (stored, _) in made.items()})
    said = summary(precision, fingerprint, {name: lost for name, (_, lost) in made.items()})
    return found, rounded_info(info, modules, found, said)
