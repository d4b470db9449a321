"""Find the module of a basis that a model's module is, by its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..errors import BasisMismatchError
from .module_names import plain_name
from .module_store import same_module
from .pipeline_parts import parts_in
from .renames import same_by_any_table


def same_plain_module(module_name: str, names: Iterable[str]) -> list[str]:
    """Return `same_module` with the names of wrappers, such as ``_orig_mod``, counting for nothing."""
    plain = {plain_name(name): name for name in names}
    return [plain[hit] for hit in same_module(plain_name(module_name), plain)]


class ModuleNames:
    """The names of a basis's modules, found by what a model calls them.

    Args:
        names: the basis's.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)
        self.own = set(self.names)
        self.plain: dict[str, list[str]] = {}
        for name in self.names:
            self.plain.setdefault(plain_name(name), []).append(name)

    def find(self, module_name: str, part: str | None = None) -> str | None:
        """Return the name for a model's module, or None; see `SubspaceBasis.find`.

        Raises:
            BasisMismatchError: several match.
        """
        if part is None and module_name in self.own:
            return module_name
        inside = "" if part is None else f"{part}."
        known: Mapping[str, list[str]] = self.plain
        if inside:
            known = {name[len(inside) :]: keys for name, keys in self.plain.items() if name.startswith(inside)}
        hits = [key for name in same_module(plain_name(module_name), known) for key in known[name]]
        return self._only(module_name, hits)

    def converted(self, module_name: str) -> str | None:
        """Return the name that transformers' conversion tables make of `module_name`, or make it of; or None.

        Raises:
            BasisMismatchError: several match.
        """
        return self._only(module_name, same_by_any_table(plain_name(module_name), self.names))

    def _only(self, module_name: str, hits: list[str]) -> str | None:
        if len(hits) < 2:
            return hits[0] if hits else None
        parts = parts_in(hits)
        remedy = (
            f"Say which part of the pipeline the model is, as basis_part={parts[0]!r} in the SubspaceConfig."
            if len(parts) == len(hits)
            else "Rename the model's modules as they were when the source adapters were trained."
        )
        raise BasisMismatchError(
            f"Module {module_name!r} matches several modules of the basis: {sorted(hits)[:5]}. {remedy}"
        )
