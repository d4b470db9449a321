"""Say in plain words what the numbers of a report mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .facts import LEFT_OUT

# shares of a left-out adapter's energy between which a basis holds a part of it. Of the twelve text tasks of
# docs/evidence.md, the five of which less was kept ended 3.2 points behind LoRA r=8, the seven others 0.7 ahead
LITTLE, MUCH = 0.06, 0.5
FAITHFUL, PARTIAL = 0.9, 0.5  # shares of the energy of an adapter that the basis was built from
RARE = 3.0  # times what random directions keep; below that a fleet's directions are not told from them


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


def _existing(numbers: Mapping[str, Any]) -> list[str]:
    kept, null, k = numbers["kept"], numbers["null_kept"], numbers["k_for_share"]
    if kept is None:
        return []
    share = f"The basis keeps {percent(kept)} of its fleet's energy"
    if null is not None:
        share += f" (of noise of the same strength, one of its size keeps {percent(null)})"
    if kept >= FAITHFUL:
        words = f"{share}: compressing these adapters loses little."
        if null is not None and null >= FAITHFUL * kept:
            words += " They fit because they are few, not because they are related: others will not."
    elif kept >= PARTIAL:
        words = (
            f"{share}: compressed, these adapters lose a part. Measure their scores, or let `compress` keep a"
            " residual."
        )
    else:
        words = f"{share}: compressed, these adapters are no longer themselves. Keep the LoRAs, or take a larger k."
    if k is not None and kept < FAITHFUL:
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
            " leave one out. Pass more with --fleet."
        ]
    words = (
        f"Of an adapter left out, a basis of the others keeps {percent(left_out)}; random directions keep"
        f" {percent(random)}."
    )
    if left_out < RARE * random:
        words += (
            " By its weights, this fleet does not tell where a new task will go: expect of the basis about what a"
            " random one of equal size gives, and a LoRA to do better."
        )
    elif left_out < LITTLE:
        words += (
            " It holds little of where new tasks go. Tasks of which as little was kept ended behind a LoRA in our own"
            " measurements, though not behind a random basis of equal size (docs/evidence.md)."
        )
    elif left_out < MUCH:
        words += (
            " It holds a part of where new tasks go. It may help where examples are few and the fleet has related"
            " tasks; where they are many, expect a LoRA to be as good or better."
        )
    else:
        words += " New tasks of this kind lie mostly within it: training in it is the natural choice."
    if mean is not None and left_out >= LITTLE and mean > left_out / 2:
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


def percent(share: float | None) -> str:
    """Format a share with three digits, and an unknown one as a dash."""
    if share is None or math.isnan(share):
        return "–"
    return f"{100 * share:.3g} %"
