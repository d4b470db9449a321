"""All sources' factors of one module, read a piece at a time, always in the same pieces and the same order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..sources.factors import gram

# entries of a piece of the stack (16 MB in float32): the same whatever the memory, so that sums are added up in one
# order and the basis has the same bytes
PIECE = 1 << 22


@dataclass(frozen=True, eq=False)
class StackPiece:
    """The factors of a few sources of one module, all of one rank.

    Attributes:
        members: the sources' places in the module's list of members.
        B: (out, n·r) float32, the sources' B side by side.
        A: (n·r, in) float32, their A one below the other.
        over_B: (n, r, r) float64, G = w² s² A Aᵀ: ``w² ΔW ΔWᵀ Q = B G (Bᵀ Q)``.
        over_A: (n, r, r) float64, w² s² BᵀB: ``w² ΔWᵀ ΔW Q = Aᵀ G (A Q)``.
    """

    members: list[int]
    B: torch.Tensor
    A: torch.Tensor
    over_B: torch.Tensor
    over_A: torch.Tensor


class ModuleStack:
    """All sources' factors of one module, a piece at a time.

    Args:
        load: place of a source → its B (out, r) and A (r, in), in any float dtype.
        ranks: r of every source.
        shape: out, in.
        scales: s of every source.
        weights: w of every source.
        energy: Σ ‖w ΔW‖² over them.
        raw: stack the factors themselves, centred over their columns (as EigenLoRAx does), instead of the updates.
        keep: bytes of pieces that may be kept from pass to pass; all pieces are kept, or none.
    """

    def __init__(
        self,
        load: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
        ranks: Sequence[int],
        shape: tuple[int, int],
        scales: Sequence[float],
        weights: Sequence[float],
        energy: float,
        *,
        raw: bool = False,
        keep: int = 0,
    ) -> None:
        self.load, self.ranks, self.shape, self.raw = load, list(ranks), shape, raw
        self.scales, self.energy = list(scales), energy
        self.weights = [w * s for w, s in zip(weights, scales, strict=True)]
        most = max(1, PIECE // sum(shape))
        # sources of one rank together, so that their r × r matrices make one batch
        order = sorted(range(len(ranks)), key=lambda i: (ranks[i], i))
        self.plan: list[list[int]] = []
        for i in order:
            last = self.plan[-1] if self.plan else []
            if last and ranks[last[0]] == ranks[i] and (len(last) + 1) * ranks[i] <= most:
                last.append(i)
            else:
                self.plan.append([i])
        self._keeps = 4 * sum(self.ranks) * sum(shape) <= keep
        self._kept: list[StackPiece] = []

    @property
    def rows(self) -> int:
        """The sum of the sources' ranks."""
        return sum(self.ranks)

    def pieces(self) -> Iterator[StackPiece]:
        """Yield the stack, always the same pieces in the same order."""
        if self._kept:
            yield from self._kept
            return
        for members in self.plan:
            piece = self._piece(members)
            if self._keeps:
                self._kept.append(piece)
            yield piece

    def forget(self) -> None:
        """Let go of kept pieces."""
        self._kept = []

    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean of B's columns (out,) and of Aᵀ's (in,), float64, in one pass."""
        out, inner = (torch.zeros(d, dtype=torch.float64) for d in self.shape)
        for piece in self.pieces():
            out += piece.B.sum(1)
            inner += piece.A.sum(0)
        return out / self.rows, inner / self.rows

    def centred_energies(self, means: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
        """Return Σ ‖b − mean‖² over the columns b of B, and the same of Aᵀ, in one pass.

        Differences are squared, instead of subtracting the mean's square from Σ ‖b‖², which would cancel.
        """
        out = inner = 0.0
        for piece in self.pieces():
            out += float((piece.B - means[0][:, None].float()).square().sum(dtype=torch.float64))
            inner += float((piece.A - means[1].float()).square().sum(dtype=torch.float64))
        return max(out, 1e-300), max(inner, 1e-300)

    def _piece(self, members: list[int]) -> StackPiece:
        out, inner = self.shape
        n, r = len(members), self.ranks[members[0]]
        # float32: large products with B and A take most of the time, and their rounding, 1e-7 of the energy, lies
        # below that of the files. The r × r matrices are in float64, since both sides' products pass through them
        B, A = torch.empty(out, n, r), torch.empty(n, r, inner)
        over_B, over_A = torch.empty(n, r, r, dtype=torch.float64), torch.empty(n, r, r, dtype=torch.float64)
        for at, i in enumerate(members):
            ours = self.load(i)
            B[:, at], A[at] = ours
            if not self.raw:
                over_B[at] = gram(ours[1]) * self.weights[i] ** 2
                over_A[at] = gram(ours[0].T) * self.weights[i] ** 2
        if self.raw:
            over_B[:] = over_A[:] = torch.eye(r)
        return StackPiece(members, B.view(out, n * r), A.view(n * r, inner), over_B, over_A)
