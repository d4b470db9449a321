"""A few modules of a fleet, in memory, on which partitions of its sources are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..energy import of_known, share_of
from ..sources.factors import Factors, in_common_span
from .fleet import Fleet
from .hosvd import exact, hosvd
from .module_plan import EXACT_COLUMNS
from .module_stack import ModuleStack
from .reader import Reader
from .streaming import compress, width_of

MODULES = 8  # compared at most, evenly spread over the model


@dataclass(frozen=True, eq=False)
class SampledModule:
    """One module's updates, in memory; sources that do not adapt it are absent.

    Attributes:
        shape: (out, in) of the module itself.
        updates: place of a source → its ΔW, in the span of all of them where that is narrower.
        norms: place → ‖ΔW‖_F.
    """

    shape: tuple[int, int]
    updates: dict[int, Factors]
    norms: dict[int, float]


Pairs = list[tuple[torch.Tensor, torch.Tensor]]


class Sample:
    """A few modules of a fleet, on which partitions are compared.

    Args:
        fleet: the sources.
        memory: bytes that the sample may take; one module is always held.
        alternations: as in `build_basis`.
        built: called after every basis.
    """

    def __init__(
        self, fleet: Fleet, memory: int, alternations: int, built: Callable[[], object] = lambda: None
    ) -> None:
        self.fleet, self.alternations, self.built = fleet, alternations, built
        reader = Reader(fleet.sources, 0)
        self.modules: list[SampledModule] = []
        self.names: list[str] = []
        step = max(1, math.ceil(len(fleet.modules) / MODULES))
        filled = 0
        for name in fleet.modules[::step]:
            members = [i for i, source in enumerate(fleet.sources) if name in source.keys and source.norms[name] > 0]
            if not members:
                continue
            size = sum(sum(fleet.sources[i].shape(name)[:2]) * fleet.sources[i].shape(name)[2] * 4 for i in members)
            if self.modules and filled + size > memory:
                break
            filled += size
            self.names.append(name)
            self.modules.append(_sampled(fleet, reader, name, members))

    def relatedness(self) -> torch.Tensor:
        """Return how much the sources' second moments agree, (N, N) float64 in [0, 1].

        That is the mean over modules and sides of the cosine ``tr(M_i M_j) / ‖M_i‖ ‖M_j‖``.

        With ``M = ΔW ΔWᵀ = X Xᵀ`` this is ``‖X_iᵀ X_j‖²_F``. Unlike the cosine of the updates it does not ask for
        equal cores.
        """
        n = len(self.fleet.sources)
        total, count = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
        for module in self.modules:
            members = list(module.updates)
            ranks = [module.updates[i].rank for i in members]
            canonical = [module.updates[i].canonical() for i in members]
            place = torch.tensor(members)
            for stack in ([P * S for P, S, _ in canonical], [T * S for _, S, T in canonical]):
                X = torch.cat(stack, 1)
                owner = torch.arange(len(members)).repeat_interleave(torch.tensor(ranks))
                # a source at a time: all products at once would be a table of all ranks squared
                rows = [(each.T @ X).square().sum(0, dtype=torch.float64) for each in stack]
                inner = torch.zeros(len(members), len(members), dtype=torch.float64).index_add_(
                    1, owner, torch.stack(rows)
                )
                norms = inner.diagonal().sqrt().clamp_min(1e-300)
                total[place[:, None], place] += inner / norms / norms[:, None]
                count[place[:, None], place] += 1
        return total / count.clamp_min(1)

    def fit(self, members: Sequence[int], k: int, most: int | None = None) -> Pairs:
        """Return per module U (out, k) and V (k, in) of these sources' basis, float64.

        Args:
            members: places of the sources; a module that none of them adapts gets no directions.
            k: directions per side.
            most: alternations at most; those of the sample by default.
        """
        rounds = self.alternations if most is None else min(most, self.alternations)
        found = [self._fit(module, [i for i in members if i in module.updates], k, rounds) for module in self.modules]
        self.built()
        return found

    def _fit(
        self, module: SampledModule, members: list[int], k: int, rounds: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, inner = next(iter(module.updates.values())).shape
        if not members:
            return torch.zeros(out, 0, dtype=torch.float64), torch.zeros(0, inner, dtype=torch.float64)
        updates = [module.updates[i] for i in members]
        counts = self.fleet.source_weights(members)
        weights = [count**0.5 / module.norms[i] for count, i in zip(counts, members, strict=True)]
        ranks = [update.rank for update in updates]
        if sum(ranks) <= EXACT_COLUMNS:
            compressed = exact([Factors(update.B.double(), update.A.double()) for update in updates], weights)
        else:
            # its pieces are kept from pass to pass: a copy of one module's factors, where the sample holds several
            stack = ModuleStack(
                lambda place: (updates[place].B, updates[place].A),
                ranks,
                (out, inner),
                [1.0] * len(members),
                weights,
                sum(counts),  # each update is of norm 1 but for its weight
                keep=4 * sum(ranks) * (out + inner),
            )
            compressed = compress(stack, min(width_of(k, sum(ranks)), sum(ranks)), leading=k, bound=False)
        pair = hosvd(compressed, k, None, rounds)
        assert pair is not None  # only a share of energy can ask for more
        return pair.U.double(), pair.V.double()

    def kept(self, basis: Pairs, members: Sequence[int]) -> list[float]:
        """Return per source the share of its energy in these modules that a basis keeps.

        Args:
            basis: per module U and V, of `fit`.
            members: places of the sources.
        """
        shares: list[dict[str, float | None]] = [{} for _ in members]
        norms: list[dict[str, float]] = [{} for _ in members]
        for name, module, (U, V) in zip(self.names, self.modules, basis, strict=True):
            for place, i in enumerate(members):
                if (update := module.updates.get(i)) is not None:
                    core = (U.T @ update.B.double()) @ (update.A.double() @ V.T)
                    norms[place][name] = module.norms[i]
                    shares[place][name] = share_of(float(core.square().sum()), module.norms[i] ** 2)
        return [of_known(each, own) or 0.0 for each, own in zip(shares, norms, strict=True)]

    def numbers(self, clusters: int, k: int) -> int:
        """Return how many parameters are stored in so many bases of k directions, and in a core for every source."""
        return sum(clusters * k * sum(m.shape) + len(m.updates) * k * k for m in self.modules)

    def equal_k(self, clusters: int, numbers: int) -> int:
        """Return the largest k with which so many bases and all cores store at most `numbers` parameters."""
        k = 1
        while self.numbers(clusters, k + 1) <= numbers:
            k += 1
        return k


def _sampled(fleet: Fleet, reader: Reader, name: str, members: list[int]) -> SampledModule:
    updates = {}
    for i in members:
        B, A = reader.pair(i, name)
        updates[i] = Factors(B.float() * fleet.sources[i].scale(name, A.shape[0]), A.float())
    shape = fleet.sources[members[0]].shape(name)[:2]
    norms = {i: fleet.sources[i].norms[name] for i in members}
    if sum(update.rank for update in updates.values()) <= EXACT_COLUMNS:
        updates = dict(zip(updates, in_common_span(list(updates.values())), strict=True))
    return SampledModule(shape, updates, norms)
