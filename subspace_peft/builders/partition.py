"""Which sources of a fleet belong on a basis of their own: a partition found, and held against one basis of equal
size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..sources.factors import Factors, in_common_span
from .fleet import Fleet
from .hosvd import exact, hosvd
from .module_plan import EXACT_COLUMNS
from .module_stack import ModuleStack
from .reader import Reader
from .streaming import compress, width_of

MODULES = 8  # compared at most, evenly spread over the model
ROUNDS = 10
# alternations where sources left out are measured: more change what is kept there by under 1 % and take most of the
# time
COMPARING = 2
FOLDS = 5
SIGNIFICANT = 2.0  # standard errors by which a finer partition has to keep more of sources that were left out


@dataclass(frozen=True, eq=False)
class Sampled:
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
        self.modules: list[Sampled] = []
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

    def alike(self) -> torch.Tensor:
        """How much sources' second moments agree (N, N): the mean over modules and sides of ``tr(M_i M_j) / ‖M_i‖
        ‖M_j‖``.

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
        """Per module U (out, k) and V (k, in) of these sources' basis, float64; without columns where none adapts it.
        At most `most` alternations, as many as the sample has without it."""
        rounds = self.alternations if most is None else min(most, self.alternations)
        found = [self._fit(module, [i for i in members if i in module.updates], k, rounds) for module in self.modules]
        self.built()
        return found

    def _fit(self, module: Sampled, members: list[int], k: int, rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
        out, inner = next(iter(module.updates.values())).shape
        if not members:
            return torch.zeros(out, 0, dtype=torch.float64), torch.zeros(0, inner, dtype=torch.float64)
        updates = [module.updates[i] for i in members]
        votes = self.fleet.source_weights(members)
        weights = [vote**0.5 / module.norms[i] for vote, i in zip(votes, members, strict=True)]
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
                sum(votes),
                keep=4 * sum(ranks) * (out + inner),
            )
            compressed = compress(stack, min(width_of(k, sum(ranks)), sum(ranks)), leading=k, bound=False)
        pair = hosvd(compressed, k, None, rounds)
        assert pair is not None  # only a share of energy can ask for more
        return pair.U.double(), pair.V.double()

    def kept(self, basis: Pairs, members: Sequence[int]) -> list[float]:
        """Per source the mean over modules of the share of ‖ΔW‖² that the basis keeps."""
        shares: list[list[float]] = [[] for _ in members]
        for module, (U, V) in zip(self.modules, basis, strict=True):
            for place, i in enumerate(members):
                if (update := module.updates.get(i)) is not None:
                    core = (U.T @ update.B.double()) @ (update.A.double() @ V.T)
                    shares[place].append(min(1.0, float(core.square().sum()) / module.norms[i] ** 2))
        return [sum(each) / max(1, len(each)) for each in shares]

    def numbers(self, clusters: int, k: int) -> int:
        """How many numbers so many bases of k directions are, and a core for every source."""
        return sum(clusters * k * sum(m.shape) + len(m.updates) * k * k for m in self.modules)

    def equal_k(self, clusters: int, numbers: int) -> int:
        """The largest k with which so many bases and all cores need at most `numbers`."""
        k = 1
        while self.numbers(clusters, k + 1) <= numbers:
            k += 1
        return k


def partition(sample: Sample, clusters: int, k: int) -> list[list[int]]:
    """The sources in at most `clusters` parts, each source with the basis of k directions that keeps most of it.

    Two starts without chance, sources far from one another as centres and average linkage, both by `Sample.alike`;
    then bases are built of the parts and sources go where most is kept, of the better start's until none moves. The
    largest part first.
    """
    count = len(sample.fleet.sources)
    if clusters == 1:
        return [list(range(count))]
    alike = sample.alike()
    starts = [_moved(sample, start, k) for start in (_far_apart(alike, clusters), _linked(alike, clusters))]
    held, before, owner = max(starts, key=lambda each: each[0])
    for _ in range(ROUNDS):
        if owner == before:
            break
        risen, before, after = _moved(sample, owner, k)
        # what is kept of some can fall by more than rises of those that moved: then it was better before
        if risen <= held + 1e-9:
            break
        held, owner = risen, after
    return sorted(_parts(owner), key=lambda part: (-len(part), part))


def _moved(sample: Sample, owner: list[int], k: int) -> tuple[float, list[int], list[int]]:
    """The energy kept of all sources by the best of the parts' bases each, the parts' numbers, and where the sources
    go."""
    count, parts = len(owner), _parts(owner)
    shares = torch.tensor([sample.kept(sample.fit(part, k), range(count)) for part in parts])
    best, moved = shares.max(0)
    own = torch.empty(count, dtype=torch.int64)
    for number, part in enumerate(parts):
        own[part] = number
    # who is kept equally well elsewhere stays
    stay = shares.gather(0, own[None])[0] >= best - 1e-9
    return float(best.sum()), own.tolist(), torch.where(stay, own, moved).tolist()


def left_out(sample: Sample, parts: Sequence[Sequence[int]], k: int) -> torch.Tensor:
    """Per source the share that the best basis keeps which was built without it and its shared-seed group, in up to 5
    folds."""
    groups = sample.fleet.groups
    # a part's groups go round the folds, so that every fold takes about as much of every part
    fold, turn = {}, 0
    for part in parts:
        for group in dict.fromkeys(groups[i] for i in part):
            if group not in fold:
                fold[group] = turn % FOLDS
                turn += 1
    found = torch.zeros(len(groups), dtype=torch.float64)
    for number in sorted(set(fold.values())):
        away = [i for i, group in enumerate(groups) if fold[group] == number]
        rest = [[i for i in part if fold[groups[i]] != number] for part in parts]
        kept = [sample.kept(sample.fit(part, k, COMPARING), away) for part in rest if part]
        if kept:
            found[away] = torch.tensor(kept, dtype=torch.float64).amax(0)
    return found


@dataclass(frozen=True)
class Step:
    """A finer partition held against a coarser one of equal size: bases and a core per source in as many numbers.

    Attributes:
        clusters, k: of the finer one.
        against, against_k: of the coarser one.
        left_out, against_left_out: mean share kept of sources that were left out.
        gain, standard_error: of the paired differences over the sources.
        taken: whether the gain is above two standard errors.
    """

    clusters: int
    k: int
    against: int
    against_k: int
    left_out: float
    against_left_out: float
    gain: float
    standard_error: float
    taken: bool


def compared(sample: Sample, finer: list[list[int]], coarser: list[list[int]], k: int) -> Step:
    """Whether `finer` is worth it."""
    other = sample.equal_k(len(coarser), sample.numbers(len(finer), k))
    one, two = left_out(sample, finer, k), left_out(sample, coarser, other)
    difference = one - two
    error = float(difference.std()) / len(difference) ** 0.5 if len(difference) > 1 else math.inf
    gain = float(difference.mean())
    return Step(
        len(finer),
        k,
        len(coarser),
        other,
        float(one.mean()),
        float(two.mean()),
        gain,
        error,
        gain > SIGNIFICANT * error,
    )


def _sampled(fleet: Fleet, reader: Reader, name: str, members: list[int]) -> Sampled:
    updates = {}
    for i in members:
        B, A = reader.pair(i, name)
        updates[i] = Factors(B.float() * fleet.sources[i].scale(name, A.shape[0]), A.float())
    shape = fleet.sources[members[0]].shape(name)[:2]
    norms = {i: fleet.sources[i].norms[name] for i in members}
    if sum(update.rank for update in updates.values()) <= EXACT_COLUMNS:
        updates = dict(zip(updates, in_common_span(list(updates.values())), strict=True))
    return Sampled(shape, updates, norms)


def _parts(owner: Sequence[int]) -> list[list[int]]:
    return [[i for i, each in enumerate(owner) if each == number] for number in sorted(set(owner))]


def _far_apart(alike: torch.Tensor, clusters: int) -> list[int]:
    """The source most like all others, then always the one least like those chosen; the others go to the likest."""
    chosen = [int(alike.sum(1).argmax())]
    while len(chosen) < min(clusters, len(alike)):
        nearest = alike[:, chosen].amax(1)
        nearest[chosen] = math.inf
        chosen.append(int(nearest.argmin()))
    owner = alike[:, chosen].argmax(1)
    owner[chosen] = torch.arange(len(chosen))
    return owner.tolist()


def _linked(alike: torch.Tensor, clusters: int) -> list[int]:
    """Average linkage: the two parts whose sources are most alike on average become one, until there are few
    enough."""
    parts = [[i] for i in range(len(alike))]
    sums = alike.clone()
    sizes = torch.ones(len(alike), dtype=alike.dtype)
    while len(parts) > clusters:
        mean = sums / sizes / sizes[:, None]
        mean.fill_diagonal_(-math.inf)
        i, j = sorted(divmod(int(mean.argmax()), len(parts)))
        parts[i] += parts.pop(j)
        sums[i] += sums[j]
        sums[:, i] += sums[:, j]
        sizes[i] += sizes[j]
        rest = [place for place in range(len(sizes)) if place != j]
        sums, sizes = sums[rest][:, rest], sizes[rest]
    owner = [0] * len(alike)
    for number, part in enumerate(parts):
        for i in part:
            owner[i] = number
    return owner
