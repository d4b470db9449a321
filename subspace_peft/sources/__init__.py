"""Read source adapters: find their files, read their dialects, and bring them to factored updates ΔW = s·B·A."""

from .factors import Factors
from .open import is_one_source, open_source
from .references import expand, expand_or_raise
from .source import Source

__all__ = ["Factors", "Source", "expand", "expand_or_raise", "is_one_source", "open_source"]
