"""The verdict in two headlines: for compressing adapters, and for training new tasks."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..energy import like_noise, percent
from .facts import LEFT_OUT
from .verdict import COMPRESSED, FEW, NEW_TASKS, NEXT, NEXT_TASKS, UNKNOWN, classes, kept_of_any

# by class, what to type
PACK = {
    "faithful": "subspace-peft compress ADAPTER … --basis {place} --out my-bundle",
    "partial": "subspace-peft compress ADAPTER … --basis {place} --residual 4 --out my-bundle",
    "poor": "",
    UNKNOWN: "",
}
IN_BASIS = "get_peft_model(model, SubspaceConfig(basis={place!r}))"
TRAIN = {
    "unrelated": "get_peft_model(model, LoraConfig(r=8))",
    "little": "get_peft_model(model, LoraConfig(r=8))",
    "part": IN_BASIS,
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


def headlines(numbers: Mapping[str, Any], place: str | None = None) -> tuple[Headline, Headline]:
    """Return the verdict for compression and the one for new tasks.

    Args:
        numbers: those of `ReportFacts`.
        place: where the basis is, as it is seen from the working directory.
    """
    place = place or "BASIS"
    kept, null, left_out, random = kept_of_any(numbers), *(numbers[key] for key in ("null_kept", LEFT_OUT, "random"))
    known, ahead = classes(numbers)
    new = numbers["kept"] is None and kept is not None
    return (
        Headline(
            "Compressing these adapters",
            known,
            kept,
            "of their energy is kept, though it was not built from them" if new else "of their energy is kept",
            "" if null is None else f"noise of the same strength: {percent(null)}",
            COMPRESSED[known] + (f" {FEW}" if kept is not None and not new and like_noise(kept, null) else ""),
            NEXT[known],
            PACK[known].format(place=shlex.quote(place)),
        ),
        Headline(
            "Training new tasks",
            ahead,
            left_out,
            "of an adapter's energy is kept by a basis of the others",
            "" if random is None or left_out is None else f"random directions: {percent(random)}",
            NEW_TASKS[ahead],
            NEXT_TASKS[ahead],
            TRAIN[ahead].format(place=place),
        ),
    )
