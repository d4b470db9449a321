"""Is this basis worth anything? Facts, spectra and nulls."""

from .inspect import inspect_path
from .null import null_basis

__all__ = ["inspect_path", "null_basis"]
