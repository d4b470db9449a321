"""The updates of a module in as few and as small steps as the alternations at many k can do with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..builders.hosvd import Compressed

Piece = tuple[list[int], torch.Tensor, torch.Tensor]  # places, (n, w_out, r), (n, r, w_in)


@dataclass(frozen=True, eq=False)
class Stacked(Compressed):
    """Updates whose cores, where one side alone is given, come turned within that side to no more than their rank.

    Sums of the cores' squares, and the other side's second moments, are the same.
    """

    def cores(
        self, factors: Sequence[float], u: torch.Tensor | None = None, v: torch.Tensor | None = None
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yield as `Compressed.cores` does, of one side in as many directions as an update has rank."""
        if (u is None) == (v is None):
            yield from super().cores(factors, u, v)
            return
        parts = []
        for places, left, right in self.parts:
            # C v = L (T v) = L Rᵀ Qᵀ: what Q turns is summed over
            if v is not None and v.shape[1] > left.shape[2]:
                right = torch.linalg.qr((right @ v).mT, mode="r")[1].mT
            elif v is not None:
                right = right @ v
            elif u is not None and u.shape[1] > left.shape[2]:
                left = torch.linalg.qr(u.T @ left, mode="r")[1]
            elif u is not None:
                left = u.T @ left
            parts.append((places, left, right))
        yield from Compressed.cores(replace(self, parts=parts), factors)

    def moment(
        self, u: torch.Tensor | None, v: torch.Tensor | None, *, output: bool, fixed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return as `Compressed.moment` does; where few directions span it, those alone."""
        given = v if output else u
        assert given is not None
        columns = sum(len(places) * min(left.shape[2], given.shape[1]) for places, left, _ in self.parts)
        if fixed or 2 * columns > (self.out if output else self.inner).Q.shape[1]:
            return super().moment(u, v, output=output, fixed=fixed)
        spans = [
            cores.transpose(0, 1).flatten(1) if output else cores.flatten(0, 1).T
            for _, cores in self.cores(self.weights, *((None, v) if output else (u, None)))
        ]
        vectors, roots, _ = torch.linalg.svd(torch.cat(spans, 1), full_matrices=False)
        return roots.square().flip(0), vectors.flip(1)


def stacked(basis: Compressed) -> Stacked:
    """Return a basis whose updates of equal rank are one piece.

    Args:
        basis: of `exact`, its pieces in float64.
    """
    parts = [(i, L, T) for places, left, right in basis.parts for i, L, T in zip(places, left, right, strict=True)]
    pieces = by_rank([(L, T) for _, L, T in parts])
    own = [([parts[n][0] for n in places], left, right) for places, left, right in pieces]
    return Stacked(**{**vars(basis), "parts": own})


def by_rank(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[Piece]:
    """Return the pairs (w_out, r), (r, w_in) of each rank r in one piece, with their places."""
    places: dict[int, list[int]] = {}
    for place, (left, _) in enumerate(pairs):
        places.setdefault(left.shape[1], []).append(place)
    return [
        (own, torch.stack([pairs[i][0] for i in own]), torch.stack([pairs[i][1] for i in own]))
        for own in places.values()
    ]
