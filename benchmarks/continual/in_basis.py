"""Methods in the basis of the given adapters: it stays as it is, is re-fitted, or grows by what each task lacks."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from benchmarks.quality.fleet import HEAD, TARGETS
from subspace_peft import SubspaceBasis, SubspaceConfig

from .learner import Apart
from .setting import Data, K, Stream

CORE_RATES = (1.2e-3, 4.8e-3, 1.92e-2)


def adapted(model: nn.Module, basis: SubspaceBasis, seed: int, **config: Any) -> nn.Module:
    """Return `model` with a task in `basis`; `config` goes to `SubspaceConfig`."""
    torch.manual_seed(seed)
    # a basis in memory would be warned of: what is trained in one is not saved here
    config["save_basis"] = basis.location is None or None
    return get_peft_model(model, SubspaceConfig(basis=basis, target_modules=TARGETS, modules_to_save=HEAD, **config))


class FrozenBasis(Apart):
    """A core of 16 × 16 per module in the first basis, which no task changes."""

    from_given = True
    rates = CORE_RATES

    def adapted(self, name: str) -> nn.Module:
        return adapted(self.untrained(name), self.data.first_basis(self.stream.given), self.stream.seed)

    def stored(self, name: str) -> tuple[int, int]:
        basis = self.data.first_basis(self.stream.given)
        return self.trained[name], sum(each.U.numel() + each.V.numel() for each in basis.values())


class RandomBasis(FrozenBasis):
    """The same in random directions, of as many as `k`: what forward transfer is held against."""

    from_given = False

    def __init__(self, data: Data, stream: Stream, rate: float, k: int = K) -> None:
        super().__init__(data, stream, rate)
        self.k = k

    def adapted(self, name: str) -> nn.Module:
        return adapted(self.untrained(name), self.basis(name), self.stream.seed)

    def basis(self, name: str) -> SubspaceBasis:
        """Return random directions; another draw with every seed."""
        return self.data.bench.control("random", name, self.k, seed=self.stream.seed)

    def stored(self, name: str) -> tuple[int, int]:
        return self.trained[name], sum(each.U.numel() + each.V.numel() for each in self.basis(name).values())
