"""Find sources that began from the same random A.

They fake a universal input subspace, so such a group counts as one source.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..sources.source import Source

SAME_START = 0.5  # cosine of raw A's: own seeds give about 0, one seed 0.9 after training (docs/architecture.md)
MODULES_COMPARED = 4
ENTRIES_COMPARED = 1024  # per module; the cosine of own seeds' samples is 0 ± 0.03, far from the threshold
ROWS = 256


def seed_groups(sources: Sequence[Source], modules: Sequence[str]) -> list[int]:
    """Return for each source the number of its group; a source alone has one of its own.

    Two sources are of one group when the cosine of their stored A's, averaged over a few modules that both have, is
    above 0.5. Of large A's the same 1,024 entries of each are compared. Sources of different rank are never of one
    group.

    Args:
        sources: the fleet.
        modules: its modules; the first few that a source has are compared.
    """
    samples: dict[tuple[str, tuple[int, ...]], tuple[list[int], list[torch.Tensor]]] = {}
    for number, source in enumerate(sources):
        for module in [module for module in modules if module in source.keys][:MODULES_COMPARED]:
            value = source.read(source.keys[module]["A"]).detach().flatten(1)
            owners, vectors = samples.setdefault((module, tuple(value.shape)), ([], []))
            owners.append(number)
            vectors.append(_sample(value.flatten()))
    stacks = [(torch.tensor(owners), torch.stack(vectors)) for owners, vectors in samples.values()]
    samples.clear()
    groups = list(range(len(sources)))
    for start in range(0, len(sources), ROWS):
        # a block of rows at a time: all pairs at once would be a table of N × N
        rows = min(ROWS, len(sources) - start)
        totals, counts = torch.zeros(rows, len(sources)), torch.zeros(rows, len(sources))
        for owners, vectors in stacks:
            mine = (owners >= start) & (owners < start + rows)
            block = (owners[mine, None] - start, owners[None])
            totals[block] += vectors[mine] @ vectors.T
            counts[block] += 1
        for i, j in ((totals > SAME_START * counts) & (counts > 0)).tril(start - 1).nonzero().tolist():
            if groups[start + i] != groups[j]:
                old, new = groups[start + i], groups[j]
                groups = [new if group == old else group for group in groups]
    order = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return [order[group] for group in groups]


def _sample(flat: torch.Tensor) -> torch.Tensor:
    """Return the same entries of every vector of a length, of norm 1, float32."""
    if len(flat) > ENTRIES_COMPARED:
        draw = torch.Generator().manual_seed(0)
        flat = flat[torch.randint(len(flat), (ENTRIES_COMPARED,), generator=draw)]
    vector = flat.to(device="cpu", dtype=torch.float64)
    return (vector / vector.norm().clamp_min(1e-300)).float()
