"""What a basis is: its algebra and its files.

Names are loaded when they are first used: looking at a basis's files needs no torch.
"""

from typing import TYPE_CHECKING

from .._lazy import attach

if TYPE_CHECKING:
    from .basis import SubspaceBasis
    from .basis_reference import BasisReference
    from .module import ModuleBasis
    from .resolve import resolve_basis, resolve_reference

_PLACES = {
    "BasisReference": "basis_reference",
    "ModuleBasis": "module",
    "SubspaceBasis": "basis",
    "resolve_basis": "resolve",
    "resolve_reference": "resolve",
}

__all__ = [
    "BasisReference",
    "ModuleBasis",
    "SubspaceBasis",
    "resolve_basis",
    "resolve_reference",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = attach(__name__, _PLACES)
