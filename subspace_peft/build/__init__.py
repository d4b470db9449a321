"""How a basis comes to be: reading source adapters, and the builders."""

from .build import build_basis
from .factors import Factors
from .sources import Source, is_one_source, open_source

__all__ = ["Factors", "Source", "build_basis", "is_one_source", "open_source"]
