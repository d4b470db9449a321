"""The sizes and the scale of a task's trained tensors: plain values, from which they follow."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..basis import ModuleBasis
from .coefficients import OWN, default_scale, make_coefficients
from .own_directions import OwnUnits, own_fields, own_units
from .patterns import pattern_for


@dataclass(frozen=True)
class TaskSizes:
    """The fields of a task's configuration that decide the sizes and the scale of its trained tensors.

    `SubspaceConfig.sizes` gives one.

    Attributes:
        coefficients: the kind of coefficients.
        k: how many of the basis's directions are used; None for all.
        rank_pattern: another k for some modules: end of the name, or a regular expression for it → k, or
            (k_out, k_in).
        r: rank of the `factor` coefficients.
        alpha: the scale's numerator.
        mean_gain: how the mean core is used: ``none``, ``fixed`` or ``trainable``.
        extra_rank: how many directions of its own the task has per module, φ.
        extra_rank_pattern: another φ for some modules, as in `rank_pattern`; 0 for none.
        embeddings: names of the modules that are embeddings.
    """

    coefficients: str
    k: int | None
    rank_pattern: Mapping[str, int | Sequence[int]]
    r: int
    alpha: float
    mean_gain: str
    extra_rank: int = 0
    extra_rank_pattern: Mapping[str, int] = field(default_factory=dict)
    embeddings: frozenset[str] = frozenset()

    def own_units(self, name: str, out: int, inner: int) -> OwnUnits:
        """Return the units of the own directions in the module `name`, whose ΔW is (out, inner)."""
        return own_units(self.alpha, out, inner, embedding=name in self.embeddings)

    def extra_of(self, name: str, shape: Mapping[str, int]) -> int:
        """Return how many directions of its own the task has in the module `name`: no more than fit.

        Args:
            name: the module.
            shape: of the basis's module, as `SubspaceBasis.shapes` has it.
        """
        rank = self.extra_asked(name)
        return min(rank, shape["out"], shape["in"]) if rank else 0

    def extra_asked(self, name: str) -> int:
        """Return how many directions of its own the configuration asks for in the module `name`."""
        key = pattern_for(self.extra_rank_pattern, name)
        return self.extra_rank if key is None else self.extra_rank_pattern[key]

    def fields_of_own(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        """Return what a configuration has to say instead, for every module to have so many directions of its own.

        Args:
            ranks: module → directions, of all modules of the task.

        Returns:
            `extra_rank` and `extra_rank_pattern`; nothing where the configuration says so already.
        """
        return own_fields(ranks) if any(self.extra_asked(name) != rank for name, rank in ranks.items()) else {}

    def k_of(self, name: str) -> int | Sequence[int] | None:
        """Return the k, or (k_out, k_in), asked for in the module `name`, or None for all that the basis has."""
        key = pattern_for(self.rank_pattern, name)
        return self.k if key is None else self.rank_pattern[key]

    def asked(self, name: str) -> tuple[int, int] | None:
        """Return the (k_out, k_in) asked for in the module `name`, or None for all that the basis has."""
        k = self.k_of(name)
        return None if k is None else (k, k) if isinstance(k, int) else (k[0], k[1])

    def used(self, name: str, k_out: int, k_in: int) -> tuple[int, int]:
        """Return the (k_out, k_in) that the task uses of a basis module: the leading k of each side, or all."""
        k = self.asked(name)
        return (k_out, k_in) if k is None else (min(k[0], k_out), min(k[1], k_in))

    def part(self, name: str, module: ModuleBasis) -> ModuleBasis:
        """Return the part of a basis module that the task uses in the module `name`."""
        size = self.used(name, module.k_out, module.k_in)
        return module if size == (module.k_out, module.k_in) else module.truncate(*size)

    def expected(self, name: str, shape: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of the trained tensors of the module `name`.

        Args:
            name: the module.
            shape: of the basis's module, as `SubspaceBasis.shapes` has it.
        """
        k_out, k_in = self.used(name, shape["k_out"], shape["k_in"])
        r = min(self.r, k_out, k_in)
        expected: dict[str, tuple[int, ...]] = {
            "core": {"weight": (k_out, k_in)},
            "factor": {"up": (k_out, r), "down": (r, k_in)},
            "diagonal": {"weight": (min(k_out, k_in),)},
            "directions": {"weight": (shape.get("directions", 0),)},
            "none": {},
        }[self.coefficients]
        expected |= {"gain": (1,)} if self.mean_gain == "trainable" else {}
        if rank := self.extra_of(name, shape):
            expected |= dict(zip(OWN, ((shape["out"], rank), (rank, shape["in"])), strict=True))
        return expected

    def scale(self, name: str, shape: Mapping[str, int]) -> float:
        """Return the scale s of the module `name`, for a basis module of the sizes in `shape`."""
        k_out, k_in = self.used(name, shape["k_out"], shape["k_in"])
        return _scale(self.alpha, self.coefficients, k_out, k_in, self.r, shape.get("directions", 0), self.mean_gain)


@functools.lru_cache(maxsize=4096)
def _scale(alpha: float, kind: str, k_out: int, k_in: int, r: int, directions: int, mean_gain: str) -> float:
    return default_scale(alpha, make_coefficients(kind, k_out, k_in, r=r, directions=directions, mean_gain=mean_gain))
