"""Say in plain words what the figures of a report mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..energy import FAITHFUL, RARE, like_noise, outlook, percent, word
from .facts import LEFT_OUT


def verdict(numbers: Mapping[str, Any]) -> list[str]:
    """Return sentences about a basis: for adapters that exist, for new tasks, and on the limits of both.

    Args:
        numbers: those of `ReportFacts`.
    """
    return [*_existing(numbers), *_new(numbers), *_groups(numbers), LIMITS]


LIMITS = (
    "Energy is no score: a direction of little energy may be what a task needs. Before you rely on the basis, train a"
    " task in it beside a random basis of equal size and a LoRA, each with its own learning rate (the recipes'"
    " `compare` does that)."
)


# what each word means for adapters that are compressed into the basis
COMPRESSED = {
    "faithful": "Compressed, these adapters answer as they did.",
    "partial": "Compressed, these adapters lose a part. Measure their scores, or let `compress` keep a residual.",
    "poor": "Compressed, these adapters are no longer themselves. Keep the LoRAs, or take a larger k.",
}
FEW = "They fit because they are few, not because they are related: others will not."
# what it means for new tasks how much is kept of adapters left out
NEW_TASKS = {
    "unrelated": (
        "By its weights, this fleet does not tell where a new task will go: expect of the basis about what a random"
        " one of equal size gives, and a LoRA to do better."
    ),
    "little": (
        "It holds little of where new tasks go. Tasks of which as little was kept ended behind a LoRA in our own"
        " measurements, though not behind a random basis of equal size (docs/evidence.md)."
    ),
    "part": (
        "It holds a part of where new tasks go. It may help where examples are few and the fleet has related tasks;"
        " where they are many, expect a LoRA to be as good or better."
    ),
    "mostly": "New tasks of this kind lie mostly within it: training in it is the natural choice.",
}
# the next step after a build, for the adapters themselves and for new tasks
NEXT = {
    "faithful": "`subspace-peft compress` packs them into one file",
    "partial": "build with a larger -k, or let `subspace-peft compress --residual RANK` keep the rest",
    "poor": "build with a larger -k, or keep the LoRAs",
}
NEXT_TASKS = {
    "unrelated": "train a LoRA, or add related adapters to the fleet",
    "little": "train a LoRA beside a task in the basis, and keep the better one",
    "part": "train a task in the basis beside a LoRA, and keep the better one",
    "mostly": "train in the basis",
}


def conclusion(numbers: Mapping[str, Any], out: str) -> list[str]:
    """Return the verdict on a basis that was just built, in short, with the next steps; empty where none is measured.

    Args:
        numbers: those of `ReportFacts`.
        out: where the basis is.
    """
    kept, null, left_out, random = (numbers[key] for key in ("kept", "null_kept", LEFT_OUT, "random"))
    if kept is None:
        return []
    lines = [f"{_share(kept, null)}: {word(kept)}.{f' {FEW}' if like_noise(kept, null) else ''}"]
    steps = [f"for these adapters, {NEXT[word(kept)]}"]
    if left_out is not None:
        lines.append(_left_out(left_out, random))
        steps.append(f"for new tasks, {NEXT_TASKS[outlook(left_out, random)]}")
    lines.append(f"Next: {'; '.join(steps)}. `subspace-peft report {out}` says more.")
    return lines


def _share(kept: float, null: float | None) -> str:
    noise = "" if null is None else f" (of noise of the same strength, one of its size keeps {percent(null)})"
    return f"The basis keeps {percent(kept)} of its adapters' energy{noise}"


def _left_out(left_out: float, random: float | None) -> str:
    beside = "" if random is None else f"; random directions keep {percent(random)}"
    return f"Of an adapter left out, a basis of the others keeps {percent(left_out)}{beside}."


def _existing(numbers: Mapping[str, Any]) -> list[str]:
    kept, null, k = numbers["kept"], numbers["null_kept"], numbers["k_for_share"]
    if kept is None:
        return []
    words = f"{_share(kept, null)}: {word(kept)}. {COMPRESSED[word(kept)]}"
    if like_noise(kept, null):
        words += f" {FEW}"
    if k is not None and word(kept) != "faithful":
        words += f" {percent(FAITHFUL)} take k={k} per side."
    even = numbers["break_even"]
    if numbers["bytes_per_lora"] is None:
        return [words]
    if even is None:
        return [f"{words} A task in it takes no fewer bytes than a LoRA: the basis never pays for itself."]
    return [f"{words} It pays for its own bytes from {even:,} such adapters on."]


def _new(numbers: Mapping[str, Any]) -> list[str]:
    left_out, random, mean = numbers[LEFT_OUT], numbers["random"], numbers["mean_only"]
    if left_out is None:
        return [
            "Of adapters that it was not built from nothing can be said: there are too few sources of own seeds to"
            " leave one out. Pass more, sources= (--fleet)."
        ]
    words = f"{_left_out(left_out, random)} {NEW_TASKS[outlook(left_out, random)]}"
    if mean is not None and outlook(left_out, random) in ("part", "mostly") and mean > left_out / 2:
        words += (
            f" Much of that is the fleet's mean, which alone keeps {percent(mean)}: try `coefficients='none'` with a"
            " trained gain."
        )
    above, k = numbers["above"], numbers["k_for_new_tasks"]
    if above is not None and max(above) == 0:
        words += " No direction stands out from noise of the same strength."
    elif above is not None:
        words += (
            f" {above[0]} output and {above[1]} input directions stand out from noise of the same strength (median"
            " over modules)."
        )
    if k is not None:
        words += (
            f" Up to k={k}, further directions keep at least {RARE:g} times as much of adapters left out as random"
            " ones would."
        )
    return [words]


def useful_k(ks: Sequence[int], left_out: Sequence[float], random: Sequence[float]) -> int | None:
    """Return the k up to which further directions are worth it for new tasks; None where none is.

    That is the largest of the sizes up to which every step keeps at least `RARE` times as much more of adapters left
    out as random directions would.

    Args:
        ks: sizes, ascending.
        left_out: the share kept of adapters left out, at each size.
        random: the share that random directions keep.
    """
    best, before, before_random = None, 0.0, 0.0
    for k, share, chance in zip(ks, left_out, random, strict=True):
        if not share - before >= RARE * (chance - before_random):
            break
        best, before, before_random = k, share, chance
    return best


def _groups(numbers: Mapping[str, Any]) -> list[str]:
    shared = numbers["in_seed_groups"]
    if not shared:
        return []
    return [
        f"{shared} of {numbers['sources']} adapters began from a random A that another one shares. That alone makes"
        " input directions common; they share one weight, and are left out together here."
    ]
