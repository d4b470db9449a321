"""Divide the memory that a build may take."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import SubspaceError
from .fleet import Fleet
from .module_plan import ModulePlan, plan_module

CORES_KEPT_UP_TO = 64  # sources: the default of `keep_cores`
GUESSED_K = 32  # where k is a share of energy
PER_TENSOR = 700  # bytes of names, places, norms and sketches for every tensor of every source, while building


class MemoryPlan:
    """The division of a given memory among a fleet's modules.

    Args:
        fleet: the sources.
        builder: as in `build_basis`.
        k: directions of the output side, as in `build_basis`.
        k_in: directions of the input side where they differ.
        weights: ``equal`` or ``norm``.
        memory: bytes that all of it may take.
        cores: how many cores are stored per module: the sources' own, and directions.
        own: module → directions of both sides, where it has another k.

    Attributes:
        needed: bytes that it takes at least.
        held: bytes of factors that may be held, as they are stored.
        keep: bytes of one module's factors that may be kept in float32.

    Raises:
        SubspaceError: a module to which no source contributes; too little memory, with the least that suffices.
    """

    def __init__(
        self,
        fleet: Fleet,
        builder: str,
        k: int | float,
        k_in: int | None,
        weights: str,
        memory: int,
        cores: int = 0,
        own: Mapping[str, int] | None = None,
    ) -> None:
        self.own = own or {}
        self.fleet, self.builder, self.weights, self.memory = fleet, builder, weights, memory
        self.k = max(k, k_in or 0) if isinstance(k, int) else GUESSED_K
        tensors = sum(2 * len(source.keys) for source in fleet.sources)
        fixed, most, name, factors = PER_TENSOR * tensors, 0, "", 0
        for module in fleet.modules:
            plan = self.module(module)
            k = plan.leading
            # float32, once as built and once as it is written
            fixed += 2 * 4 * (k * sum(plan.shape) + cores * k**2)
            # the sources' cores in float64, and three arrays of their size in the SVD that finds principal directions
            work = plan.working_bytes + (3 * 8 * len(plan.members) * k**2 if cores else 0)
            factors = max(factors, 4 * sum(plan.ranks) * sum(plan.shape))
            if work > most:
                most, name = work, module
        self.needed = fixed + most
        if self.needed > memory:
            # a tenth more, in MB, rounded up
            enough = -(-self.needed * 11 // 10**7)
            raise SubspaceError(
                f"max_memory={memory / 1e6:.0f}MB is too little: building module {name!r} takes {most / 1e6:.0f}MB,"
                f" what is known of {len(fleet.sources)} sources and the basis itself {fixed / 1e6:.0f}MB. Give at"
                f" least {enough}MB."
            )
        rest = memory - self.needed
        # pieces kept in float32 save reading and converting again, but should not crowd out the files' own bytes
        self.keep = factors if 3 * factors <= 2 * rest else 0
        self.held = rest - self.keep

    def module(self, name: str) -> ModulePlan:
        """Return how one module is built.

        Raises:
            SubspaceError: every source's update of it is zero.
        """
        return plan_module(self.fleet, name, self.own.get(name, self.k), self.weights)
