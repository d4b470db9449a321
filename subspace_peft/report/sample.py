"""Draw the sources that a report measures on, and the folds that are left out together."""

from __future__ import annotations

import random
from collections.abc import Sequence

GROUPS_ONE_BY_ONE = 12  # so many shared-seed groups are left out one at a time, more in FOLDS parts
FOLDS = 4


def draw_sample(groups: Sequence[int], limit: int, seed: int) -> list[int]:
    """Return the places of at most `limit` sources: whole seed groups, in random order, as long as they fit."""
    if len(groups) <= limit:
        return list(range(len(groups)))
    order = list(dict.fromkeys(groups))
    random.Random(seed).shuffle(order)
    chosen: list[int] = []
    for group in order:
        members = [i for i, other in enumerate(groups) if other == group]
        if len(chosen) + len(members) <= limit:
            chosen += members
    # one group alone may be larger than the sample
    return sorted(chosen or range(limit))


def draw_folds(groups: Sequence[int], seed: int) -> list[int]:
    """Return per source its fold; shared-seed groups stay together."""
    order = list(dict.fromkeys(groups))
    if len(order) <= GROUPS_ONE_BY_ONE:
        return [order.index(group) for group in groups]
    random.Random(seed).shuffle(order)
    return [order.index(group) % FOLDS for group in groups]
