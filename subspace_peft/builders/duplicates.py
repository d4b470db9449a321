"""Find sources that are one and the same adapter: the same bytes, or updates that point the same way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from ..sources.factors import Factors
from ..sources.source import Source

# cosine of updates: another dtype moves it by 1e-5 at most, another seed or another task to far below
# (docs/architecture.md)
SAME = 0.999
PROBES = 16
CANDIDATE = 0.9  # cosine of sketches; those of equal updates are equal


def sketch(update: Factors, probes: int = PROBES) -> torch.Tensor:
    """Return ``yᵢᵀ ΔW xᵢ`` (probes,) float64 for fixed random x and y, which depend on the shape alone.

    Where updates agree, so do these.

    Args:
        update: ΔW in factored form.
        probes: how many.
    """
    return (half_sketch(update.B.T, "B", probes) * half_sketch(update.A, "A", probes)).sum(0)


def half_sketch(rows: torch.Tensor, side: str, probes: int = PROBES) -> torch.Tensor:
    """Return one factor's part of `sketch`: Bᵀy or A x, (r, probes) float64.

    Args:
        rows: Bᵀ (r, out) or A (r, in) in any float dtype; of lower precision than float64, products are in float32.
        side: ``B`` or ``A``.
        probes: how many.
    """
    vectors = drawn(rows.shape[1], side, probes)
    return rows @ vectors if rows.dtype == torch.float64 else (rows.float() @ vectors.float()).double()


@lru_cache(maxsize=16)
def drawn(d: int, side: str, probes: int) -> torch.Tensor:
    """Draw vectors (d, probes) float64, the same for every source; ``drawn.cache_clear()`` frees them."""
    generator = torch.Generator().manual_seed(2 * d + (side == "A"))
    return torch.randn(d, probes, generator=generator, dtype=torch.float64)


def cosine(a: Source, b: Source) -> float:
    """Return the cosine between two sources' updates over all modules that either has, in factored form."""
    inner = 0.0
    for name in a.keys.keys() & b.keys.keys():
        one, two = a.factors(name), b.factors(name)
        if one.shape == two.shape:
            inner += float(((one.B.T @ two.B) * (one.A @ two.A.T)).sum())
    norms = [sum(source.norm(name) ** 2 for name in source.keys) ** 0.5 for source in (a, b)]
    return inner / max(norms[0] * norms[1], 1e-300)


def duplicates(
    sources: Sequence[Source], sketches: Sequence[torch.Tensor], same: float = SAME
) -> list[tuple[int, int, float | None]]:
    """Return the sources that repeat an earlier one.

    Args:
        sources: the fleet, of which only pairs with similar sketches are read again.
        sketches: per source the `sketch` of its modules, (modules, probes) in the order of its `keys`.
        same: from this cosine on two sources are one.

    Returns:
        For each its number, the earlier one's, and their cosine; None where they have the same bytes,
        of tasks on one basis.
    """
    found: list[tuple[int, int, float | None]] = []
    seen: dict[tuple[str, str | None], int] = {}
    # sources with the same modules, each with its sketch as one vector of norm 1
    kept: dict[frozenset[str], tuple[list[int], torch.Tensor]] = {}
    for i, source in enumerate(sources):
        if (first := seen.setdefault((source.sha256, source.task_on), i)) != i:
            found.append((i, first, None))
            continue
        names = list(source.keys)
        vector = sketches[i][sorted(range(len(names)), key=names.__getitem__)].flatten().float()
        vector = vector / vector.norm().clamp_min(1e-30)
        own = frozenset(names)
        numbers, rows = kept.get(own, ([], vector[None][:0]))
        candidates = (rows[: len(numbers)] @ vector > CANDIDATE).nonzero().flatten().tolist()
        for j in (numbers[place] for place in candidates):
            if (value := cosine(source, sources[j])) >= same:
                found.append((i, j, value))
                break
        else:
            if len(numbers) == len(rows):
                # doubled now and then, so that a fleet of N is not copied N times
                rows = torch.cat([rows, torch.empty(max(8, len(rows)), len(vector))])
            rows[len(numbers)] = vector
            numbers.append(i)
            kept[own] = (numbers, rows)
    return found
