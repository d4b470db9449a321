"""The verdict in two headlines: for compressing adapters, and for training new tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..energy import FAITHFUL, percent
from .advice import (
    DIRECTIONS,
    UNKNOWN,
    classes,
    kept_of_any,
    kept_of_new_tasks,
    meaning,
    new_meaning,
    new_step,
    of_others,
    own_is_better,
    saves_nothing,
    step,
    with_directions,
)
from .facts import LEFT_OUT
from .places import typed
from .verdict import control

# by class, what to type
PACK = {
    "faithful": "subspace-peft compress ADAPTER … --basis {place} --out my-bundle",
    "partial": (
        "subspace-peft compress ADAPTER … --basis {place} --min-energy {faithful:g} --residual {rank} --out my-bundle"
    ),
    "poor": "",
    UNKNOWN: "",
}
IN_BASIS = "get_peft_model(model, SubspaceConfig(basis={place!r}))"
WITH_OWN = f"get_peft_model(model, SubspaceConfig(basis={{place!r}}, extra_rank={DIRECTIONS}))"
TRAIN = {
    "unrelated": "get_peft_model(model, LoraConfig(r=8))",
    "little": WITH_OWN,
    "part": WITH_OWN,
    "mostly": IN_BASIS,
    UNKNOWN: "",
}


@dataclass(frozen=True)
class Headline:
    """The verdict for one use of a basis: compressing its adapters, or training new tasks in it.

    Attributes:
        use: what it is about.
        word: the class of the share, as `subspace_peft.energy` names it; ``unknown`` where it was not measured.
        share: of energy, or None.
        of: what it is a share of.
        beside: what noise or random directions keep, in words.
        sentence: what it means.
        advice: what to do.
        command: what to type for that, with the parts to fill in in capitals; empty where there is none.
    """

    use: str
    word: str
    share: float | None
    of: str
    beside: str
    sentence: str
    advice: str
    command: str


def headlines(
    numbers: Mapping[str, Any], place: str | None = None, builder: str | None = None
) -> tuple[Headline, Headline]:
    """Return the verdict for compression and the one for new tasks.

    Args:
        numbers: those of `ReportFacts`.
        place: where the basis is, as it is seen from the working directory.
        builder: of the basis.
    """
    place = place or "BASIS"
    kept, random = kept_of_any(numbers), numbers["random"]
    if kept is None and numbers.get("built_from") == 0:
        first, second, measure, train = control(builder, typed(place))
        return (
            Headline("Compressing adapters", UNKNOWN, None, "", "", first, measure, ""),
            Headline("Training new tasks", UNKNOWN, None, "", "", second, train, IN_BASIS.format(place=place)),
        )
    known, ahead = classes(numbers)
    new, held = of_others(numbers), kept_of_new_tasks(numbers)
    chance = "" if random is None else f"random directions: {percent(random)}"
    null = "" if numbers["null_kept"] is None else f"noise of the same strength: {percent(numbers['null_kept'])}"
    better = f"; a basis of these: {percent(numbers[LEFT_OUT])} of one left out" if own_is_better(numbers) else ""
    packed, rank = with_directions(numbers)
    pack = "" if saves_nothing(numbers) else PACK[packed].format(place=typed(place), rank=rank or 4, faithful=FAITHFUL)
    return (
        Headline(
            "Compressing these adapters",
            known,
            kept,
            f"of their energy is kept{', at least' if numbers.get('at_least') else ''}"
            + (", though it was not built from them" if new else ""),
            chance if new else null,
            meaning(numbers),
            step(numbers),
            pack,
        ),
        Headline(
            "Training new tasks",
            ahead,
            held,
            "of these adapters' energy is kept, which it was not built from"
            if new
            else "of an adapter's energy is kept by a basis of the others",
            "" if held is None else chance + better,
            new_meaning(numbers),
            new_step(numbers),
            "subspace-peft build ADAPTER … --out my-basis"
            if own_is_better(numbers)
            else TRAIN[ahead].format(place=place),
        ),
    )
