"""How a build divides the memory that it may take."""

from __future__ import annotations

import re

from ..errors import SubspaceError
from .fleet import Fleet
from .module_plan import ModulePlan, plan_module

CORES_KEPT_UP_TO = 64  # sources: the default of `keep_cores`
GUESSED_K = 32  # where k is a share of energy
PER_TENSOR = 700  # bytes of names, places, norms and sketches for every tensor of every source, while building
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
SIZE = re.compile(r"\s*(?P<number>\d+(\.\d+)?)\s*(?P<unit>[kmgt]i?)?b?\s*", re.IGNORECASE)


# accelerate's `convert_file_size_to_int` knows neither "1.5g" nor "1TiB" nor "2000000", reads "2Gb" as bits, and takes
# half a second to import beyond torch
def parse_size(size: int | str) -> int:
    """Return a size such as ``2GB``, ``512MiB`` or ``1.5g`` in bytes.

    Args:
        size: a number of bytes, or a text of a number and a unit; case and spaces do not matter.

    Raises:
        SubspaceError: it is no size above 0.
    """
    found = SIZE.fullmatch(str(size)) if not isinstance(size, bool) else None
    count = int(float(found["number"]) * UNITS[(found["unit"] or "").lower()]) if found else 0
    if count <= 0:
        raise SubspaceError(f"max_memory={size!r} is no size: give one like '2GB', '512MiB', or a number of bytes.")
    return count


class MemoryPlan:
    """How a fleet's modules are built within a given memory.

    Args:
        fleet: the sources.
        builder: as in `build_basis`.
        k: directions of the output side, as in `build_basis`.
        k_in: directions of the input side where they differ.
        weights: ``equal`` or ``norm``.
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
            plan = self.module(module)
            # float32, once as built and once as it is written
            fixed += 2 * 4 * (self.k * sum(plan.shape) + cores * self.k**2)
            # the sources' cores in float64, and three arrays of their size in the SVD that finds principal directions
            work = plan.working_bytes + (3 * 8 * len(plan.members) * self.k**2 if cores else 0)
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
        return plan_module(self.fleet, name, self.k, self.weights)
