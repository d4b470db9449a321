"""The sizes and the scale of a task's trained tensors: plain values, from which they follow."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from peft.utils.other import get_pattern_key

from ..basis import ModuleBasis
from .coefficients import default_scale, make_coefficients


@dataclass(frozen=True)
class TaskSizes:
    """The fields of a task's configuration that decide the sizes and the scale of its trained tensors.

    `SubspaceConfig.sizes` gives one.

    Attributes:
        coefficients: the kind of coefficients.
        k: how many of the basis's directions are used; None for all.
        rank_pattern: another k for some modules: end of the name, or a regular expression for it → k.
        r: rank of the `factor` coefficients.
        alpha: the scale's numerator.
        mean_gain: how the mean core is used: ``none``, ``fixed`` or ``trainable``.
    """

    coefficients: str
    k: int | None
    rank_pattern: Mapping[str, int]
    r: int
    alpha: float
    mean_gain: str

    def k_of(self, name: str) -> int | None:
        """Return the k asked for in the module `name`, or None for all that the basis has."""
        return self.rank_pattern.get(get_pattern_key(self.rank_pattern.keys(), name), self.k)

    def used(self, name: str, k_out: int, k_in: int) -> tuple[int, int]:
        """Return the (k_out, k_in) that the task uses of a basis module: the leading k of each side, or all."""
        k = self.k_of(name)
        return (k_out, k_in) if k is None else (min(k, k_out), min(k, k_in))

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
        return expected | ({"gain": (1,)} if self.mean_gain == "trainable" else {})

    def scale(self, name: str, shape: Mapping[str, int]) -> float:
        """Return the scale s of the module `name`, for a basis module of the sizes in `shape`."""
        k_out, k_in = self.used(name, shape["k_out"], shape["k_in"])
        return _scale(self.alpha, self.coefficients, k_out, k_in, self.r, shape.get("directions", 0), self.mean_gain)


@functools.lru_cache(maxsize=4096)
def _scale(alpha: float, kind: str, k_out: int, k_in: int, r: int, directions: int, mean_gain: str) -> float:
    return default_scale(alpha, make_coefficients(kind, k_out, k_in, r=r, directions=directions, mean_gain=mean_gain))
