"""What a basis is: its algebra and its files."""

from .basis import SubspaceBasis
from .basis_reference import BasisReference
from .module import ModuleBasis
from .resolve import resolve_basis, resolve_reference

__all__ = ["BasisReference", "ModuleBasis", "SubspaceBasis", "resolve_basis", "resolve_reference"]
