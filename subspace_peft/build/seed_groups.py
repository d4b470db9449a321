"""Sources that began from the same random A. They fake a universal input subspace, so a group shares one vote."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .sources import Source

SAME_START = 0.5  # cosine of raw A's: own seeds give about 0, one seed 0.9 after training (docs/method.md)
MODULES_COMPARED = 4


def seed_groups(sources: Sequence[Source], modules: Sequence[str]) -> list[int]:
    """For each source the number of its group; sources alone in theirs have one of their own.

    Two sources are of one group when the cosine of their stored A's, averaged over a few modules that both have, is
    above 0.5. Sources of different rank are never of one group.
    """
    vectors: list[dict[str, torch.Tensor]] = []
    for source in sources:
        shared = [module for module in modules if module in source.keys][:MODULES_COMPARED]
        flat = {module: source.raw(module)[1].flatten() for module in shared}
        vectors.append({module: vector / vector.norm().clamp_min(1e-300) for module, vector in flat.items()})
    groups = list(range(len(sources)))
    for i in range(len(sources)):
        for j in range(i):
            if groups[i] != groups[j] and _cosine(vectors[i], vectors[j]) > SAME_START:
                old, new = groups[i], groups[j]
                groups = [new if group == old else group for group in groups]
    order = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return [order[group] for group in groups]


def _cosine(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    both = [module for module in a if module in b and a[module].shape == b[module].shape]
    return sum(float(a[module] @ b[module]) for module in both) / len(both) if both else 0.0
