"""The rows of the comparison: those of `common.methods` on the top layers, with this benchmark's learning rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import common as shared
from common import Method
from peft import PeftConfig

from subspace_peft import SubspaceBasis

from .fleet import HEAD, TARGETS

WHERE = shared.adapted(target_modules=TARGETS, modules_to_save=HEAD)
# a factor of 4 between neighbours; `compare` goes on beyond an edge that is best, at most twice
HEAD_RATES = (1e-3, 4e-3, 1.6e-2)
LORA_RATES = (4e-4, 1.6e-3, 6.4e-3)
VERA_RATES = (2e-2, 8e-2, 3.2e-1)
MEAN_RATES = (1e-1, 4e-1, 1.6)
CORE_RATES = (1.2e-3, 4.8e-3, 1.92e-2)


@dataclass(frozen=True)
class PerSeed(Method):
    """A row whose adapter is another one for every seed: `make` returns a seed's configuration."""

    make: Callable[[int], PeftConfig] | None = None

    def for_seed(self, seed: int | None) -> PeftConfig | None:
        """Return the configuration of a run with `seed`; that of seed 0 without one."""
        assert self.make is not None
        return self.make(seed or 0)


def head_only() -> Method:
    """Return the row that trains nothing but the head."""
    return shared.head_only(HEAD_RATES)


def lora(r: int) -> Method:
    """Return the row of LoRA of rank r."""
    return shared.lora(r, WHERE, LORA_RATES)


def vera(r: int) -> Method:
    """Return the row of VeRA of rank r."""
    return shared.vera(r, WHERE, VERA_RATES)


def drawn_vera(r: int, number: Callable[[int], int]) -> PerSeed:
    """Return the row of VeRA whose frozen projections are drawn by `number` of a run's seed."""
    row = vera(r)

    def for_seed(seed: int) -> PeftConfig:
        assert row.adapter is not None
        config = row.adapter()
        config.projection_prng_key = number(seed)
        return config

    return PerSeed(row.name, lambda: for_seed(0), row.rates, make=for_seed)


def inside(name: str, basis: SubspaceBasis, rates: tuple[float, ...] = CORE_RATES, **config: Any) -> Method:
    """Return a row whose coefficients are trained in `basis`; `config` goes to `SubspaceConfig`."""
    return shared.in_basis(name, basis, WHERE, rates, **config)


def inside_per_seed(name: str, make: Callable[[int], SubspaceBasis], **config: Any) -> PerSeed:
    """Return a row `inside` a basis that `make` makes from a seed: of its training examples, or drawn by it."""
    made = cache(make)

    def for_seed(seed: int) -> PeftConfig:
        adapter = inside(name, made(seed), **config).adapter
        assert adapter is not None
        return adapter()

    return PerSeed(name, lambda: for_seed(0), CORE_RATES, make=for_seed)


def mean_only(basis: SubspaceBasis) -> Method:
    """Return the row that trains the gain of the fleet's mean core alone."""
    return inside("mean only", basis, MEAN_RATES, coefficients="none", mean_gain="trainable")
