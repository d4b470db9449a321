"""What a basis is: its algebra and its files."""

from .basis import SubspaceBasis
from .module import ModuleBasis
from .resolve import resolve_basis

__all__ = ["ModuleBasis", "SubspaceBasis", "resolve_basis"]
