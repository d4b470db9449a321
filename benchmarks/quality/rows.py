"""The rows of the comparison: how the top layers are adapted, and which learning rates are tried."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from common.methods import Method
from peft import LoraConfig, PeftConfig, VeraConfig

from subspace_peft import SubspaceBasis, SubspaceConfig

from .fleet import HEAD, TARGETS

WHERE: dict[str, Any] = {"target_modules": TARGETS, "modules_to_save": HEAD}
# a factor of 4 between neighbours; `compare` goes on beyond an edge that is best, at most twice
HEAD_RATES = (1e-3, 4e-3, 1.6e-2)
LORA_RATES = (4e-4, 1.6e-3, 6.4e-3)
VERA_RATES = (2e-2, 8e-2, 3.2e-1)
MEAN_RATES = (1e-1, 4e-1, 1.6)
CORE_RATES = (1.2e-3, 4.8e-3, 1.92e-2)


@dataclass(frozen=True)
class PerSeed(Method):
    """A row whose adapter depends on the training examples that a seed draws: `for_seed` makes its configuration."""

    for_seed: Callable[[int], PeftConfig] | None = None


def head_only() -> Method:
    return Method("head only", None, HEAD_RATES)


def lora(r: int) -> Method:
    return Method(f"LoRA r={r}", lambda: LoraConfig(r=r, lora_alpha=2 * r, **WHERE), LORA_RATES)


def vera(r: int) -> Method:
    def config() -> PeftConfig:
        with warnings.catch_warnings():
            # of projections that are not saved: nothing here is
            warnings.simplefilter("ignore")
            return VeraConfig(r=r, save_projection=False, **WHERE)

    return Method(f"VeRA r={r}", config, VERA_RATES)


def inside(name: str, basis: SubspaceBasis, rates: tuple[float, ...] = CORE_RATES, **config: Any) -> Method:
    """A row whose coefficients are trained in `basis`; `config`: of `SubspaceConfig`."""
    return Method(name, lambda: _inside(basis, **config), rates)


def inside_per_seed(name: str, make: Callable[[int], SubspaceBasis], **config: Any) -> PerSeed:
    """`inside` a basis that `make` makes from a seed's training examples. The sweep's, of seed 0, stands for all in
    what is kept."""
    made = cache(make)
    return PerSeed(
        name, lambda: _inside(made(0), **config), CORE_RATES, for_seed=lambda seed: _inside(made(seed), **config)
    )


def _inside(basis: SubspaceBasis, **config: Any) -> PeftConfig:
    return SubspaceConfig(basis=basis, save_basis=True, **config, **WHERE)


def mean_only(basis: SubspaceBasis) -> Method:
    return inside("mean only", basis, MEAN_RATES, coefficients="none", mean_gain="trainable")
