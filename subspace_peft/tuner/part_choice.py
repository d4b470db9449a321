"""Tell which part of a pipeline a model is, where a pipeline's basis has modules of the same names for several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ..basis import SubspaceBasis
from ..basis.pipeline_parts import parts_in
from ..errors import BasisMismatchError
from .config import SubspaceConfig
from .targets import outer_modules, sizes, supported


def choose_part(config: SubspaceConfig, model: nn.Module, basis: SubspaceBasis) -> str | None:
    """Return the part of the basis's pipeline that `model` is.

    Where names alone tell, that is what the configuration says, None as a rule. Where modules of several parts have
    the same names, as those of two text encoders, it is the part whose shapes are the model's.

    Args:
        config: a new adapter's, or a saved task's, which knows its part.
        model: the base model.
        basis: the adapter's.

    Raises:
        BasisMismatchError: the basis has no such part, or several fit; names them.
    """
    parts = parts_in(basis)
    if config.basis_part is not None and config.basis_part not in parts:
        raise BasisMismatchError(
            f"basis_part={config.basis_part!r}: the basis has no such part; it has {', '.join(parts) or 'none'}."
        )
    if config.basis_part is not None or config.loaded or len(parts) < 2:
        return config.basis_part
    known = {name: sizes(module) for name, module in outer_modules(model) if supported(module)}
    if not _ambiguous(basis, known):
        return None
    fits = [part for part in parts if _fits(basis, part, known)]
    if len(fits) != 1:
        raise BasisMismatchError(
            f"Which part of the pipeline {type(model).__name__} is cannot be told by its modules' names and shapes:"
            f" {' and '.join(fits) or 'none of ' + ', '.join(parts)} would fit. Say which: basis_part="
            f"{(fits or parts)[-1]!r} in the SubspaceConfig."
        )
    return fits[0]


def _ambiguous(basis: SubspaceBasis, names: Iterable[str]) -> bool:
    try:
        for name in names:
            basis.find(name)
    except BasisMismatchError:
        return True
    return False


def _fits(basis: SubspaceBasis, part: str, known: Mapping[str, tuple[int, int]]) -> bool:
    """Return whether all of a part's modules are in the model, in their shapes."""
    shapes = basis.shapes()
    found = {key: size for name, size in known.items() if (key := basis.find(name, part)) is not None}
    whole = sum(name.startswith(f"{part}.") for name in basis) == len(found)
    return whole and all((shapes[key]["out"], shapes[key]["in"]) == size for key, size in found.items())
