"""Where a task was read from, as its configuration keeps it for as long as it lives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LoadedFrom:
    """Where a task was read from, on this machine: true of one process, and so never saved.

    Attributes:
        folder: of the task's files; a relative place of the basis is looked for in it first. None: not known.
        token: with which the Hub is asked for the basis, as in huggingface_hub.
        basis_given: whether the caller said where the basis is; then it is taken from there and from nowhere else.
        modules: module → sizes of the basis's module (as `SubspaceBasis.shapes` has them), for the modules whose
            coefficients were found, and checked, in the task's own file. None: no file was checked.
        renamed: module in the task's file → module of the model that it was loaded into, where their names differ.
    """

    folder: Path | None = None
    token: str | bool | None = field(default=None, repr=False)
    basis_given: bool = False
    modules: Mapping[str, Mapping[str, int]] | None = field(default=None, repr=False)
    renamed: Mapping[str, str] | None = field(default=None, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # a token is no part of what is pickled or copied
        return LoadedFrom, (self.folder, None, self.basis_given, self.modules, self.renamed)
