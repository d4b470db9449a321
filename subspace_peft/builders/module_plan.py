"""Plan the computation of one module's basis: its sources and their weights, and whether it is exact or streamed."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import SubspaceError
from ..sources.factors import Factors
from .fleet import Fleet
from .module_stack import ModuleStack
from .reader import Reader
from .streaming import width_of, working_memory

EXACT_COLUMNS = 512  # of the stack, all sources' ranks: up to there an exact SVD costs about what power iteration does
EXACT_NUMBERS = 1 << 23  # entries of the stack


@dataclass(frozen=True)
class ModulePlan:
    """The plan of one module. All lists have one entry per member.

    Attributes:
        name: of the module.
        members: places of the sources that take part, those whose update is not zero.
        shape: out, in.
        ranks: r of every update.
        norms: ‖ΔW‖_F of every update.
        source_weights: how much every source counts within its shared-seed group, see `Fleet.source_weights`.
        scales: s in ΔW = s·B·A.
        weights: w, by which every update enters the stack.
        weighted: w·s.
        energy: Σ ‖w ΔW‖².
        exact: whether the stack is small enough for an exact SVD. This depends on its size alone, not on the memory at
            hand, so that the basis has the same bytes on every machine.
        leading: directions per side that have to be right.
        width: of the subspaces that they are sought in.
    """

    name: str
    members: list[int]
    shape: tuple[int, int]
    ranks: list[int]
    norms: list[float]
    source_weights: list[float]
    scales: list[float]
    weights: list[float]
    weighted: list[float]
    energy: float
    exact: bool
    leading: int
    width: int

    @property
    def working_bytes(self) -> int:
        """The most bytes that building takes beside the module's factors."""
        if self.exact:
            # float64; about eight arrays of the stack's size live at once in QR, SVD and what they return
            return 8 * 8 * sum(self.ranks) * sum(self.shape)
        return working_memory(self.shape, self.ranks, self.width)

    @property
    def cost(self) -> float:
        """The work in multiply-adds, up to a factor.

        That is the sum over both sides of d·ranks·min(d, ranks), or streamed of d·ranks·width.
        """
        ranks = sum(self.ranks)
        return float(sum(d * ranks * (min(d, ranks) if self.exact else self.width) for d in self.shape))

    def updates(self, reader: Reader) -> list[Factors]:
        """Read the members' updates (float64), scale folded in."""
        pairs = (reader.pair(i, self.name) for i in self.members)
        return [Factors(B.double() * scale, A.double()) for (B, A), scale in zip(pairs, self.scales, strict=True)]

    def stack(self, reader: Reader, *, keep: int, raw: bool = False) -> ModuleStack:
        """Return the members' factors as a stack that is read a piece at a time.

        Args:
            reader: of the fleet's files.
            keep: bytes of pieces that may be kept from pass to pass.
            raw: stack the factors themselves instead of the updates, see `ModuleStack`.
        """
        return ModuleStack(
            lambda place: reader.pair(self.members[place], self.name),
            self.ranks,
            self.shape,
            self.scales,
            self.weights,
            self.energy,
            raw=raw,
            keep=keep,
        )


def plan_module(fleet: Fleet, name: str, k: int, weights: str) -> ModulePlan:
    """Plan one module of a fleet.

    Args:
        fleet: the sources.
        name: of the module.
        k: directions per side that have to be right.
        weights: ``equal`` (every update counts as of norm 1) or ``norm`` (as large as it is).

    Raises:
        SubspaceError: every source's update of this module is zero.
    """
    sources = fleet.sources
    members = [i for i, source in enumerate(sources) if name in source.keys and source.norms[name] > 0]
    if not members:
        raise SubspaceError(f"Module {name!r}: every source's update is zero. Leave it out of the sources.")
    shapes = [sources[i].shape(name) for i in members]
    out, inner, _ = shapes[0]
    ranks = [rank for _, _, rank in shapes]
    norms = [sources[i].norms[name] for i in members]
    counts = fleet.source_weights(members)
    scales = [sources[i].scale(name, rank) for i, rank in zip(members, ranks, strict=True)]
    # second moments take w², so a source that counts c times enters with √c
    own = [count**0.5 / (norm if weights == "equal" else 1.0) for count, norm in zip(counts, norms, strict=True)]
    columns = sum(ranks)
    return ModulePlan(
        name,
        members,
        (out, inner),
        ranks,
        norms,
        counts,
        scales,
        own,
        weighted=[w * s for w, s in zip(own, scales, strict=True)],
        energy=sum((w * norm) ** 2 for w, norm in zip(own, norms, strict=True)),
        exact=columns <= EXACT_COLUMNS and columns * max(out, inner) <= EXACT_NUMBERS,
        leading=k,
        width=min(width_of(k, columns), columns, max(out, inner)),
    )
