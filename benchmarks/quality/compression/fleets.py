"""Which fleets there are, and what is measured of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from subspace_peft.errors import SubspaceError

from .. import tasks
from ..fleet import SOURCE_BUDGET, SOURCE_RATE, source
from .cells import Plan
from .choices import CHOICES, LORA_RATES, SEEDS, SWEPT_WITH, Choice, basis_of, trained
from .continued import BUDGET as CONTINUED
from .continued import VARIANTS, continued, member_name
from .encoder_members import encoder_member
from .members import Fleet
from .schemes import Scheme, brief, every, few, in_given, several

RANK = 8  # of the sources
OWN = Choice("own random starts", LORA_RATES, "own")


def declared(names: Sequence[str], seed: int, rate: float, **more: Any) -> dict[str, Any]:
    """Return what decides the adapters of an encoders' fleet."""
    return {
        "members": list(names),
        "seed": seed,
        "rate": rate,
        "budget": asdict(SOURCE_BUDGET),
        "sizes": tasks.SIZES,
        "tokens": tasks.TOKENS,
        "top": tasks.TOP,
        **more,
    }


def own_fleet(fleet: str, names: Sequence[str], folder: Path, seed: int, schemes: Sequence[Scheme]) -> Plan:
    """Return the plan of a fleet of LoRAs from own starts at the sources' rate.

    Those of seed 0 are the benchmark's sources.
    """

    def make() -> Fleet:
        def lora(name: str) -> Path:
            if seed == 0:
                return source(name, folder)
            return trained(OWN, name, names, seed, SOURCE_RATE, folder)[0]

        return Fleet([encoder_member(name, lora(name), folder) for name in names])

    return Plan(fleet, f"seed {seed}", declared(names, seed, SOURCE_RATE), make, schemes)


def benchmark_fleets(folder: Path) -> dict[str, list[Plan]]:
    """Return the plans of the benchmark's own fleets, of the text tasks and of the images.

    All schemes with the first seed, the chief ones with two more.
    """
    found = {}
    for kind in ("text", "image"):
        names = tasks.names(kind)
        most = RANK * len(names)
        found[kind] = [own_fleet(kind, names, folder, SWEPT_WITH, every(most))]
        found[kind] += [own_fleet(kind, names, folder, seed, several(most)) for seed in SEEDS[:2]]
    return found


def members_of(family: str) -> list[str]:
    """Return the tasks of a family, see benchmarks/quality/families.

    Raises:
        SubspaceError: this checkout has no families.
    """
    try:
        registry = import_module("benchmarks.quality.families.registry")
    except ModuleNotFoundError as error:
        raise SubspaceError(
            f"The fleet {family!r} needs benchmarks/quality/families, which this checkout lacks ({error}): take a"
            " later one, or leave the group `families` out."
        ) from None
    return [f"{family}/{member}" for member in registry.family(family).order]


def family_fleets(folder: Path, families: Sequence[str]) -> list[Plan]:
    """Return the plans of families of related tasks, one seed each: their members are the other draws."""
    plans = []
    for family in families:
        names = members_of(family)
        plans.append(own_fleet(f"family-{family}", names, folder, SWEPT_WITH, several(RANK * len(names))))
    return plans


def continued_fleet(folder: Path) -> Plan:
    """Return the plan of `continued`'s fleet."""
    names = tasks.names("text")
    both = [(task, variant) for variant in range(VARIANTS) for task in names]

    def make() -> Fleet:
        return Fleet(
            [encoder_member(member_name(task, n), continued(task, n, folder), folder, task=task) for task, n in both]
        )

    settings = declared(names, SWEPT_WITH, SOURCE_RATE, variants=VARIANTS, more=asdict(CONTINUED))
    return Plan("continued", "seed 0", settings, make, few())


def choice_plans(
    fleet: str,
    names: Sequence[str],
    folder: Path,
    rate_of: Callable[[Choice], float],
    choices: Sequence[Choice] = CHOICES,
    seeds: Sequence[int] = SEEDS,
) -> Iterator[Plan]:
    """Yield the plans of one fleet trained in every way that its owner can choose, one seed of all after the other.

    Args:
        fleet: the name of its file of results.
        names: its tasks.
        folder: the benchmark's cache.
        rate_of: gives the rate of a choice, by a sweep where there is none yet.
        choices: which.
        seeds: of the training.
    """
    for seed in seeds:
        for choice in choices:
            rate = rate_of(choice)
            settings = declared(names, seed, rate, choice=choice.slug)
            make = _maker(choice, names, folder, seed, rate)
            yield Plan(fleet, f"{choice.name}, seed {seed}", settings, make, _of(choice))


def _of(choice: Choice) -> list[Scheme]:
    if not choice.start:
        return in_given()
    return brief(shared_inputs=choice.start != "own")


def _maker(choice: Choice, names: Sequence[str], folder: Path, seed: int, rate: float) -> Callable[[], Fleet]:
    def make() -> Fleet:
        loras = {name: trained(choice, name, names, seed, rate, folder)[0] for name in names}
        return Fleet(
            [encoder_member(name, lora, folder) for name, lora in loras.items()],
            given=basis_of(choice, names, seed, folder) if choice.basis else None,
            generated=choice.generated,
            frozen_inputs=choice.start == "frozen",
        )

    return make
