"""A basis's modules by name: which there are, what a model's modules are called in it, projection on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from .._shown import Shown, Table
from ..errors import BasisMismatchError
from .layout import describe_k
from .matching import ModuleNames
from .module import ModuleBasis
from .module_names import plain_name
from .module_store import MemoryModules, ModuleStore

Self = TypeVar("Self", bound="ModulesByName")


class ModulesByName(Shown, Mapping[str, ModuleBasis]):
    """A mapping from module name to `ModuleBasis`: what `SubspaceBasis` is without its provenance and files.

    Args:
        modules: module name → basis.
    """

    def __init__(self, modules: Mapping[str, ModuleBasis]) -> None:
        self._other_names: Mapping[str, str] = {}
        self._modules = modules if isinstance(modules, ModuleStore) else MemoryModules(modules)
        self._names: ModuleNames | None = None

    def __getitem__(self, name: str) -> ModuleBasis:
        return self._modules.module(name)

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def _shown_table(self) -> Table:
        shapes = self.shapes()
        rows = ((name, f"{s['out']} × {s['in']}", f"{s['k_out']}, {s['k_in']}") for name, s in shapes.items())
        return ("module", "out × in", "k out, k in"), rows, len(shapes)

    @property
    def file(self) -> Path | None:
        """The file on this machine that holds the tensors, or None for a basis in memory."""
        return self._modules.file

    @property
    def precision(self) -> str | None:
        """What U and V are stored as, where that is not the dtype in which they are given, else None.

        See `to_precision`.
        """
        return self._modules.precision

    def stored(self, name: str) -> Mapping[str, torch.Tensor]:
        """Return a module's tensors as they are in the file, by name; the module's digest is of these."""
        self._modules.check_name(name)
        return self._modules.stored(name)

    def shapes(self) -> dict[str, dict[str, int]]:
        """Return ``{"out", "in", "k_out", "k_in", "directions"}`` per module; no tensor is read from a file for it."""
        return self._modules.shapes()

    def describe_k(self) -> str:
        """Return ``k=16``, or ``k=8…16`` where modules or sides differ."""
        return describe_k(self.shapes())

    def find(self, module_name: str, part: str | None = None, *, converted: bool = True) -> str | None:
        """Return the basis's name for a model's module: the same, or one that differs by leading parts; else None.

        A task head adds a prefix to its backbone's module names: ``encoder.layer.0.query`` and
        ``bert.encoder.layer.0.query`` are the same weight. Wrappers' names, such as ``_orig_mod``, count for nothing.
        Where there is none, names from before and after transformers renamed a module are the same, too.

        Args:
            module_name: the module's.
            part: of a pipeline's basis the part that the model is, such as ``text_encoder_2``; None: any.
            converted: whether transformers' conversion tables are asked, those of all models.

        Raises:
            BasisMismatchError: several of the basis's modules match.
        """
        if self._names is None:
            self._names = ModuleNames(self._modules)
        said = self._other_names.get(module_name) or self._other_names.get(plain_name(module_name))
        found = said or self._names.find(module_name, part)
        return self._names.converted(module_name) if found is None and converted else found

    def named(self: Self, names: Mapping[str, str]) -> Self:
        """Return this basis, which also finds its modules by further names: name → the basis's own."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._other_names = {name: own for name, own in names.items() if own in self._modules}
        return other

    # -- algebra ----------------------------------------------------------------------------------------------------

    def project(self, delta: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the cores ``C = Uᵀ ΔW Vᵀ`` of updates, the least-squares optimum in this basis.

        Args:
            delta: per module, ΔW (out, in) or its factors ``(B, A)``, (out, r) and (r, in).

        Returns:
            Per module of the basis, C (k_out, k_in).

        Raises:
            BasisMismatchError: the basis does not have a module, or a shape does not fit; names it.
        """
        cores = {}
        for name, value in delta.items():
            key = self.find(name)
            if key is None:
                raise BasisMismatchError(
                    f"The basis has no module {name!r}; it has {len(self)}, such as {next(iter(self))!r}. Project only"
                    " modules that the basis was built for, or build one from sources that adapt it."
                )
            try:
                cores[key] = self[key].project(value)
            except BasisMismatchError as error:
                raise BasisMismatchError(f"Module {name!r}: {error}") from None
        return cores

    def reconstruct(self, cores: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the updates ``ΔW = U C V`` (out, in) that cores (k_out, k_in) stand for, per module.

        `project(reconstruct(C))` is C up to rounding.

        Raises:
            BasisMismatchError: the basis does not have a module, or a core's shape does not fit.
        """
        missing = [name for name in cores if name not in self._modules]
        if missing:
            raise BasisMismatchError(f"The basis has no module {missing[0]!r}; these cores belong to another basis.")
        return {name: self[name].reconstruct(core) for name, core in cores.items()}
