"""What follows from the shares that a basis keeps: what they mean, and what to do with adapters and for new tasks.

The verdict's lines and the page's cards take it from here. Importing this module needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..energy import FAITHFUL, like_noise, outlook, word
from .facts import LEFT_OUT

UNKNOWN = "unknown"  # the class of what was not measured
# own directions for a new task: with two, tasks unlike the fleet's ended about where LoRA r=8 does (docs/evidence.md)
DIRECTIONS = 2
OWN = f"{DIRECTIONS} directions of the task's own, `SubspaceConfig(basis=…, extra_rank={DIRECTIONS})`"

# by the class of what is kept of the adapters themselves: what that means, and what to do with them
COMPRESSED = {
    "faithful": "Compressed, these adapters answer as they did.",
    "partial": "Compressed, these adapters lose a part. Measure their scores, or let `compress` keep a residual.",
    "poor": "Compressed by it alone, these adapters are no longer themselves.",
    UNKNOWN: "It was not measured what the basis keeps of adapters.",
}
FEW = "They fit because they are few, not because they are related: others will not."
LIKE_NOISE = "It keeps of noise about as much: it holds nothing that these adapters share."
FITS = {"faithful": FEW, "partial": FEW, "poor": LIKE_NOISE}  # where noise is kept as well
NEXT = {
    "faithful": "compress these adapters, `subspace-peft compress`",
    "partial": "compress these adapters with a residual, `subspace-peft compress --min-energy {faithful:g} --residual"
    " {rank}`, or {larger}",
    "poor": "keep these adapters as LoRAs, or {larger}",
    UNKNOWN: "",
}
ONE_NEW = "project it with {rank} directions of its own, `subspace-peft project --extra-rank {rank}`"
SAVES_NOTHING = {
    "one": "keep this adapter as a LoRA: a basis is for several",
    "some": "keep these adapters as LoRAs: basis and tasks together take no fewer bytes",
}
# by the class of what is kept of adapters left out: what that means for new tasks, and what to do with these. On five
# new tasks of an independent check a core of k=16 in a fleet's basis ended behind the head alone and behind LoRA;
# tasks with related ones in the fleet gained
NEW_TASKS = {
    "unrelated": (
        "By its weights, this fleet does not tell where a new task will go: expect of the basis about what a random"
        " one of equal size gives, and a LoRA to do better."
    ),
    "little": (
        "It holds little of where new tasks go. Tasks of which as little was kept ended behind a LoRA in our own"
        " measurements, though not behind a random basis of equal size; with directions of their own beside the basis"
        " they ended about where a LoRA of as many does (docs/evidence.md)."
    ),
    "part": (
        "It holds a part of where new tasks go. It may help where examples are few and the fleet has related tasks;"
        " elsewhere expect a LoRA, and maybe the head alone, to be as good or better."
    ),
    "mostly": (
        "New tasks of this kind lie mostly within it: training in it is the natural choice, with the head alone and a"
        " LoRA beside it."
    ),
    UNKNOWN: "What it holds of new tasks was not measured.",
}
# the same of a basis that was built of other adapters, or of none, than those it is held against
NEW_TASKS_OF_OTHERS = {
    **NEW_TASKS,
    "unrelated": "It holds of such tasks about what random directions do: expect a LoRA to do better.",
}
NEXT_TASKS = {
    "unrelated": f"use LoRA, or add related adapters to the fleet; to stay in this basis, add {OWN}",
    "little": f"add {OWN}, train a LoRA as well, and keep the better one",
    "part": "train a task in the basis beside the head alone and a LoRA, and keep the best; without related tasks in"
    f" the fleet, add {OWN}, or use LoRA",
    "mostly": "train in the basis",
    UNKNOWN: "use LoRA: nothing tells yet what the basis holds of other tasks",
}
NEXT_TASKS_OF_OTHERS = {
    **NEXT_TASKS,
    "unrelated": f"use LoRA; to stay in this basis, add {OWN}",
}


def kept_of_any(numbers: Mapping[str, Any]) -> float | None:
    """Return what is kept of the basis's own adapters; of a report on others alone, what is kept of those."""
    return numbers.get("kept_of_new") if numbers["kept"] is None else numbers["kept"]


def of_others(numbers: Mapping[str, Any]) -> bool:
    """Return whether the basis was held against adapters none of which it was built from."""
    return numbers["kept"] is None and numbers.get("kept_of_new") is not None


def kept_of_new_tasks(numbers: Mapping[str, Any]) -> float | None:
    """Return the share that tells of new tasks in this basis.

    That is what it keeps of adapters it was not built from, where it was held against such ones alone; else what a
    basis of the others keeps of its own ones.
    """
    return numbers["kept_of_new"] if of_others(numbers) else numbers[LEFT_OUT]


def classes(numbers: Mapping[str, Any]) -> tuple[str, str]:
    """Return the class of what is kept of the adapters, and the one of what is kept of new tasks."""
    kept, ahead = kept_of_any(numbers), kept_of_new_tasks(numbers)
    return (
        UNKNOWN if kept is None else word(kept),
        UNKNOWN if ahead is None else outlook(ahead, numbers["random"]),
    )


def own_is_better(numbers: Mapping[str, Any]) -> bool:
    """Return whether a basis of the adapters themselves would hold more of new tasks like them, by a class or more."""
    left_out = numbers[LEFT_OUT]
    if not of_others(numbers) or left_out is None:
        return False
    order = list(NEW_TASKS)
    return order.index(outlook(left_out, numbers["random"])) > order.index(classes(numbers)[1])


def saves_nothing(numbers: Mapping[str, Any]) -> bool:
    """Return whether it is known that the basis and its adapters in it take no fewer bytes than their LoRAs."""
    if of_others(numbers) or classes(numbers)[0] in ("poor", UNKNOWN):
        return False
    even, sources = numbers.get("break_even"), numbers.get("built_from")
    if sources == 1:
        return True
    if even is None:
        # where the sizes were added up, there is no such number: never
        return numbers.get("bytes_per_lora") is not None
    return sources is not None and sources < even


def meaning(numbers: Mapping[str, Any]) -> str:
    """Return what the share kept of the adapters means."""
    known, kept = classes(numbers)[0], kept_of_any(numbers)
    return f"{COMPRESSED[known]}{fits_like_noise(numbers) if kept is not None else ''}"


def fits_like_noise(numbers: Mapping[str, Any]) -> str:
    """Return, with a space before it, what to know where noise is kept as well as the basis's own adapters are."""
    kept = numbers["kept"]
    if kept is None:
        return ""
    # a lone adapter's noise is kept as it is itself, whether that was measured or not
    if not (like_noise(kept, numbers["null_kept"]) or numbers.get("built_from") == 1):
        return ""
    return f" {FITS[word(kept)]}"


def new_meaning(numbers: Mapping[str, Any]) -> str:
    """Return what the share kept of new tasks means."""
    return (NEW_TASKS_OF_OTHERS if of_others(numbers) else NEW_TASKS)[classes(numbers)[1]]


def with_directions(numbers: Mapping[str, Any]) -> tuple[str, int | None]:
    """Return the class that decides what to do with the adapters, and the rank of the residual that it takes.

    With so many directions of their own beside the basis all are faithful. Where tasks with them, and a basis that was
    built for them, are no smaller than the LoRAs, compressing is of no use; where they are, it is even if the basis
    alone keeps little. The rank is None where it was not measured, or none is needed.
    """
    known, rank = classes(numbers)[0], numbers.get("extra_rank")
    if not rank or known not in ("partial", "poor"):
        return known, None
    task = numbers["bytes_per_task"] + rank * numbers["bytes_per_direction"]
    basis = 0 if of_others(numbers) else numbers["bytes_of_basis"]
    if basis + numbers["sources"] * task < numbers["sources"] * numbers["bytes_per_lora"]:
        return "partial", rank
    return "poor", None


def step(numbers: Mapping[str, Any]) -> str:
    """Return what to do with the adapters; empty where nothing is known of them."""
    if saves_nothing(numbers):
        return SAVES_NOTHING["one" if numbers.get("built_from") == 1 else "some"]
    known, rank = with_directions(numbers)
    if known == "poor" and fits_like_noise(numbers):
        return "keep these adapters as LoRAs"
    larger = "build a basis of them" if of_others(numbers) else "build with a larger k"
    if rank and of_others(numbers) and numbers["sources"] == 1:
        return ONE_NEW.format(rank=rank)
    return NEXT[known].format(rank=rank or "RANK", larger=larger, faithful=FAITHFUL)


def new_step(numbers: Mapping[str, Any]) -> str:
    """Return what to do for new tasks."""
    if own_is_better(numbers):
        return "build a basis of these adapters, which holds more of such tasks, and train in that"
    return (NEXT_TASKS_OF_OTHERS if of_others(numbers) else NEXT_TASKS)[classes(numbers)[1]]
