"""Divide a fleet's sources among several bases, and compare the partition with one basis of equal size.

This is k-means with subspaces for centres (k-planes, Bradley and Mangasarian 2000): each source goes to the basis that
keeps most of it, and bases are built again of the sources they got.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .fleet_sample import Sample

ROUNDS = 10
# alternations where sources left out are measured: more change what is kept there by under 1 % and take most of the
# time
COMPARING = 2
FOLDS = 5
SIGNIFICANT = 2.0  # standard errors by which a finer partition has to keep more of sources that were left out


def partition(sample: Sample, clusters: int, k: int) -> list[list[int]]:
    """Divide the sources into at most `clusters` parts, each source with the basis that keeps most of it.

    There are two starts without chance, sources far from one another as centres and average linkage, both by
    `Sample.relatedness`. Then bases are built of the parts and sources go where most is kept, of the better start's
    until none moves. The largest part comes first.

    Args:
        sample: of the fleet.
        clusters: how many parts at most.
        k: directions per side of every basis.
    """
    count = len(sample.fleet.sources)
    if clusters == 1:
        return [list(range(count))]
    related = sample.relatedness()
    starts = [_moved(sample, start, k) for start in (_far_apart(related, clusters), _linked(related, clusters))]
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
    """Build the parts' bases, and move every source to the one that keeps most of it.

    Args:
        sample: of the fleet.
        owner: per source its part.
        k: directions per side.

    Returns:
        The energy kept of all sources, each by its best basis; the parts, numbered from 0; and the new ones.
    """
    count, parts = len(owner), _parts(owner)
    shares = torch.tensor([sample.kept(sample.fit(part, k), range(count)) for part in parts])
    best, moved = shares.max(0)
    own = torch.empty(count, dtype=torch.int64)
    for number, part in enumerate(parts):
        own[part] = number
    # a source that is kept equally well elsewhere stays
    stay = shares.gather(0, own[None])[0] >= best - 1e-9
    return float(best.sum()), own.tolist(), torch.where(stay, own, moved).tolist()


def left_out_shares(sample: Sample, parts: Sequence[Sequence[int]], k: int) -> torch.Tensor:
    """Return per source the share kept by the best of the parts' bases, built without it and its shared-seed group.

    Args:
        sample: of the fleet.
        parts: places of every part's sources.
        k: directions per side.

    Returns:
        (N,) float64, from up to `FOLDS` folds.
    """
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
    """A finer partition held against a coarser one of equal size: bases and a core per source in as many parameters.

    Attributes:
        clusters: of the finer one.
        k: its directions per side.
        against: the coarser one's clusters.
        against_k: its directions per side.
        left_out: mean share that the finer one keeps of sources that were left out.
        against_left_out: the same of the coarser one.
        gain: mean of the paired differences over the sources.
        standard_error: of that mean.
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
    """Compare two partitions with as many parameters stored; `k` is the finer one's directions per side.

    A single basis of n·k directions holds whatever n bases of k do, but its cores are n² times as large: so energy at
    n·k says nothing, and the coarser one gets as many directions as both store the same with.
    """
    other = sample.equal_k(len(coarser), sample.numbers(len(finer), k))
    one, two = left_out_shares(sample, finer, k), left_out_shares(sample, coarser, other)
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


def _parts(owner: Sequence[int]) -> list[list[int]]:
    return [[i for i, each in enumerate(owner) if each == number] for number in sorted(set(owner))]


def _far_apart(related: torch.Tensor, clusters: int) -> list[int]:
    """Start from sources far from one another: return per source its part.

    The first centre is the source most related to all others, each further one the least related to those chosen. The
    others go to the centre that they are most related to.
    """
    chosen = [int(related.sum(1).argmax())]
    while len(chosen) < min(clusters, len(related)):
        nearest = related[:, chosen].amax(1)
        nearest[chosen] = math.inf
        chosen.append(int(nearest.argmin()))
    owner = related[:, chosen].argmax(1)
    owner[chosen] = torch.arange(len(chosen))
    return owner.tolist()


def _linked(related: torch.Tensor, clusters: int) -> list[int]:
    """Start by average linkage: return per source its part.

    The two parts whose sources are most related on average become one, until there are few enough.
    """
    parts = [[i] for i in range(len(related))]
    sums = related.clone()
    sizes = torch.ones(len(related), dtype=related.dtype)
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
    owner = [0] * len(related)
    for number, part in enumerate(parts):
        for i in part:
            owner[i] = number
    return owner
