"""Sources that are one and the same adapter: the same bytes, or updates that point the same way."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .factors import Factors
from .sources import Source

SAME = 0.999  # cosine of updates: another dtype moves it by 1e-5 at most, another seed or another task to far below (docs/architecture.md)
PROBES = 16
CANDIDATE = 0.9  # cosine of sketches; those of equal updates are equal


def sketch(update: Factors, probes: int = PROBES) -> torch.Tensor:
    """``yᵢᵀ ΔW xᵢ`` (probes,) for fixed random x and y, which depend on the shape alone: where updates agree, so do these."""
    out, inner = update.shape
    generator = torch.Generator().manual_seed(out * 1_000_003 + inner)
    Y = torch.randn(out, probes, generator=generator, dtype=torch.float64)
    X = torch.randn(inner, probes, generator=generator, dtype=torch.float64)
    return ((update.B.T @ Y) * (update.A @ X)).sum(0)


def cosine(a: Source, b: Source) -> float:
    """Cosine between two sources' updates over all modules that either has, in factored form."""
    inner = 0.0
    for name in a.keys.keys() & b.keys.keys():
        one, two = a.factors(name), b.factors(name)
        if one.shape == two.shape:
            inner += float(((one.B.T @ two.B) * (one.A @ two.A.T)).sum())
    norms = [sum(source.norm(name) ** 2 for name in source.keys) ** 0.5 for source in (a, b)]
    return inner / max(norms[0] * norms[1], 1e-300)


def duplicates(
    sources: Sequence[Source], sketches: Sequence[dict[str, torch.Tensor]], same: float = SAME
) -> list[tuple[int, int, float | None]]:
    """For each source that repeats an earlier one: its number, the earlier one's, and their cosine (None: the same bytes).

    Args:
        sources: the fleet, of which only pairs with similar sketches are read again.
        sketches: per source and module what `sketch` gives.
        same: from this cosine on two sources are one.
    """
    found = []
    seen: dict[str, int] = {}
    kept: list[int] = []
    for i, source in enumerate(sources):
        if (first := seen.setdefault(source.sha256, i)) != i:
            found.append((i, first, None))
            continue
        for j in kept:
            if sources[j].keys.keys() != source.keys.keys():
                continue
            pair = [torch.cat([sketches[n][name] for name in source.keys]) for n in (i, j)]
            if torch.cosine_similarity(*pair, dim=0) > CANDIDATE and (value := cosine(source, sources[j])) >= same:
                found.append((i, j, value))
                break
        else:
            kept.append(i)
    return found
