"""What a build does per module, exactly or streamed, and how it divides the memory it may take."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import SubspaceError
from .fleet import Fleet
from .streaming import width_of, working_memory

EXACT_COLUMNS = 512  # of the stack, all sources' ranks: up to there an exact SVD costs about what power iteration does
EXACT_NUMBERS = 1 << 23  # in the stack
CORES_KEPT_UP_TO = 64  # sources: what `keep_cores` is where nobody says
GUESSED_K = 32  # where k is a share of energy
PER_TENSOR = 700  # bytes of names, places, norms and sketches for every tensor of every source, while building
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
SIZE = re.compile(r"\s*(?P<number>\d+(\.\d+)?)\s*(?P<unit>[kmgt]i?)?b?\s*", re.IGNORECASE)


def parse_size(size: int | str) -> int:
    """Bytes of ``2GB``, ``512MiB``, ``1.5g`` or a number of bytes. Raises `SubspaceError` on anything else."""
    found = SIZE.fullmatch(str(size)) if not isinstance(size, bool) else None
    count = int(float(found["number"]) * UNITS[(found["unit"] or "").lower()]) if found else 0
    if count <= 0:
        raise SubspaceError(f"max_memory={size!r} is no size: give one like '2GB', '512MiB', or a number of bytes.")
    return count


@dataclass(frozen=True)
class Module:
    """How one module is built. Lists are per member.

    Attributes:
        members: places of the sources that take part, those whose update is not zero.
        shape: out, in.
        ranks, norms, votes: r, ‖ΔW‖_F, and the vote within the shared-seed group.
        scales, weights, weighted: s, w, and w·s.
        energy: Σ ‖w ΔW‖².
        exact: whether the stack is small enough for an exact SVD: a matter of its size alone, not of memory at hand.
        leading, width: directions that have to be right, and the width of the subspaces they are sought in.
    """

    members: list[int]
    shape: tuple[int, int]
    ranks: list[int]
    norms: list[float]
    votes: list[float]
    scales: list[float]
    weights: list[float]
    weighted: list[float]
    energy: float
    exact: bool
    leading: int
    width: int

    @property
    def work(self) -> int:
        """Bytes that building it takes at most beside its factors."""
        if self.exact:
            return 8 * 8 * sum(self.ranks) * sum(self.shape)
        return working_memory(self.shape, self.ranks, self.width)


class Plan:
    """How a fleet's modules are built.

    Args:
        fleet: the sources.
        builder, k, k_in, weights: as in `build_basis`.
        memory: bytes that all of it may take.
        cores: how many cores are stored per module: the sources' own, and directions.

    Attributes:
        needed: bytes that it takes at least.
        held: bytes of factors that may be held, as they are stored.
        keep: bytes of one module's factors that may be kept in float32.

    Raises:
        SubspaceError: a module to which no source contributes; too little memory, with the least that suffices.
    """

    def __init__(
        self, fleet: Fleet, builder: str, k: int | float, k_in: int | None, weights: str, memory: int, cores: int = 0
    ) -> None:
        self.fleet, self.builder, self.weights = fleet, builder, weights
        self.k = max(k, k_in or 0) if isinstance(k, int) else GUESSED_K
        tensors = sum(2 * len(source.keys) for source in fleet.sources)
        fixed, most, name, factors = PER_TENSOR * tensors, 0, "", 0
        for module in fleet.modules:
            task = self.module(module)
            # float32, once as built and once as it is written
            fixed += 2 * 4 * (self.k * sum(task.shape) + cores * self.k**2)
            # the sources' cores in float64, and as what principal directions are found from
            work = task.work + (3 * 8 * len(task.members) * self.k**2 if cores else 0)
            factors = max(factors, 4 * sum(task.ranks) * sum(task.shape))
            if work > most:
                most, name = work, module
        self.needed = fixed + most
        if self.needed > memory:
            enough = -(-self.needed * 11 // 10**7)
            raise SubspaceError(
                f"max_memory={memory / 1e6:.0f}MB is too little: building module {name!r} takes {most / 1e6:.0f}MB,"
                f" what is known of {len(fleet.sources)} sources and the basis itself {fixed / 1e6:.0f}MB. Give at"
                f" least {enough}MB."
            )
        rest = memory - self.needed
        self.keep = factors if 3 * factors <= 2 * rest else 0
        self.held = rest - self.keep

    def module(self, name: str) -> Module:
        sources = self.fleet.sources
        members = [i for i, source in enumerate(sources) if name in source.keys and source.norms[name] > 0]
        if not members:
            raise SubspaceError(f"Module {name!r}: every source's update is zero. Leave it out of the sources.")
        shapes = [sources[i].shape(name) for i in members]
        out, inner, _ = shapes[0]
        ranks = [rank for _, _, rank in shapes]
        norms = [sources[i].norms[name] for i in members]
        votes = self.fleet.votes(members)
        scales = [sources[i].scale(name, rank) for i, rank in zip(members, ranks, strict=True)]
        own = [vote**0.5 / (norm if self.weights == "equal" else 1.0) for vote, norm in zip(votes, norms, strict=True)]
        columns = sum(ranks)
        return Module(
            members,
            (out, inner),
            ranks,
            norms,
            votes,
            scales,
            own,
            weighted=[w * s for w, s in zip(own, scales, strict=True)],
            energy=sum((w * norm) ** 2 for w, norm in zip(own, norms, strict=True)),
            exact=columns <= EXACT_COLUMNS and columns * max(out, inner) <= EXACT_NUMBERS,
            leading=self.k,
            width=min(width_of(self.k, columns), columns, max(out, inner)),
        )


def cost(task: Module) -> float:
    """How the work grows: (out + in)·ranks·min(ranks, dimension), streamed (out + in)·ranks·width."""
    ranks = sum(task.ranks)
    return float(sum(d * ranks * (min(d, ranks) if task.exact else task.width) for d in task.shape))
