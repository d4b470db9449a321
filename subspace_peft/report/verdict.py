"""Say in plain words what a basis is worth: for the adapters that exist, for new tasks, and what to do next.

A build ends with three of these lines, the report begins with them, and its page has them as two cards. Importing this
module needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..energy import EXPLAINED, FAITHFUL, RARE, EnergyRecord, outlook, percent, word
from .advice import COMPRESSED, fits_like_noise, meaning, new_meaning, new_step, of_others, own_is_better
from .advice import step as step_of
from .facts import LEFT_OUT
from .pays import break_even_on_record
from .places import typed

if TYPE_CHECKING:
    from ..basis import SubspaceBasis

LIMITS = (
    "Energy is no score: a direction of little energy may be what a task needs. Before you rely on the basis, train a"
    " task in it beside the head alone, a random basis of equal size and a LoRA, each with its own learning rate (the"
    " recipes' `compare` does that)."
)
NOT_MEASURED = "What a basis of the others keeps of an adapter left out was not measured with this one."
KINDS = {"random": "random directions", "base-weights": "leading directions of the base model's weights"}


def verdict_of(basis: SubspaceBasis | str | Path) -> list[str]:
    """Return three lines about a basis, from what its config has on record.

    They are: what it keeps of its sources beside noise and random directions, what of an adapter left out, and what to
    do next. `report_basis` measures what is not on record.

    Args:
        basis: the basis, its folder or its Hub id.

    Raises:
        BasisNotFoundError: there is no such basis.
    """
    from ..basis import SubspaceBasis

    if not isinstance(basis, SubspaceBasis):
        basis = SubspaceBasis.from_pretrained(basis)
    return verdict_on_record(basis.info, basis.location, basis.shapes(), explain=True)


def verdict_on_record(
    info: Mapping[str, Any], place: str | None, sizes: Mapping[str, Any], *, explain: bool = False
) -> list[str]:
    """Return the lines of `verdict_of` from a basis's ``info``.

    Args:
        info: see `SubspaceBasis`.
        place: where the basis is, for the commands.
        sizes: of its modules, as `SubspaceBasis.shapes` returns them.
        explain: say what energy is.
    """
    record = EnergyRecord.of(info)
    place = typed(place) if place else "BASIS"
    if not record.sources:
        first, second, measure, train = control(info.get("builder"), place)
        return [first, second, f"Next: {measure}; for new tasks, {train}."]
    even, known = break_even_on_record(info, sizes)
    numbers = {
        "kept": record.kept,
        "null_kept": record.null,
        LEFT_OUT: record.left_out,
        "random": record.random,
        "break_even": even,
        "bytes_per_lora": True if known else None,
        "built_from": len(record.sources),
    }
    groups = {str(entry.get("seed_group")) for entry in info.get("sources") or () if isinstance(entry, Mapping)}
    if record.left_out is not None:
        return [_kept(numbers, at_least=record.at_least, explain=explain), _left_out(numbers), _next(numbers)]
    if len(groups) < 2:
        why = "Of an adapter left out nothing can be said: no other one is left, or all began from one random A."
        step = "use LoRA: one adapter tells nothing of others"
    else:
        why = NOT_MEASURED
        step = f"see `subspace-peft report {place}`, which measures that, before you train in it"
    return [_kept(numbers, at_least=record.at_least, explain=explain), why, _next(numbers, step)]


def control(builder: object, place: str) -> tuple[str, str, str, str]:
    """Return what can be said of a basis of no adapters: of adapters, of new tasks, and what to do about both.

    Args:
        builder: on record.
        place: where the basis is, as it is typed.
    """
    kind = KINDS.get(str(builder), "directions")
    return (
        f"The basis is of no adapters: it has {kind}, the control that every other basis is held against.",
        "What a basis of others keeps of an adapter left out cannot be said of it: it was built without any.",
        f"`subspace-peft report {place} --fleet ADAPTER …` says what it keeps of adapters",
        "train one in it as the control of one in a fleet's basis; to have a good task alone, use LoRA",
    )


def verdict(numbers: Mapping[str, Any]) -> list[str]:
    """Return sentences about a basis: the three of `verdict_of` with what more a report knows, and the limits of all.

    Args:
        numbers: those of `ReportFacts`.
    """
    return [*_existing(numbers), *_new(numbers), _next(numbers), *_groups(numbers), LIMITS]


def _next(numbers: Mapping[str, Any], new: str | None = None) -> str:
    """Return what to do next: with the adapters, and for new tasks, `new` where it is said already."""
    return f"Next: {'; '.join(filter(None, [step_of(numbers), f'for new tasks, {new or new_step(numbers)}']))}."


def _kept(numbers: Mapping[str, Any], *, at_least: bool = False, explain: bool = False) -> str:
    """Return what is kept of the basis's own adapters, beside noise and random directions, and the word for it."""
    kept, null, random = numbers["kept"], numbers["null_kept"], numbers["random"]
    if kept is None:
        return "What the basis keeps of its adapters is not on record."
    beside = []
    if null is not None:
        beside.append(f"{percent(null)} that one of its size keeps of noise of the same strength")
    if random is not None:
        beside.append(f"{percent(random)} that random directions keep of anything")
    return (
        f"The basis keeps {'at least ' if at_least else ''}{percent(kept)} of its adapters' energy"
        + (f" ({EXPLAINED})" if explain else "")
        + (f", beside {' and '.join(beside)}" if beside else "")
        + f": {word(kept)}."
        + fits_like_noise(numbers)
    )


def _left_out(numbers: Mapping[str, Any]) -> str:
    left_out, random = numbers[LEFT_OUT], numbers["random"]
    beside = "" if random is None else f"; random directions keep {percent(random)}"
    return f"Of an adapter left out, a basis of the others keeps {percent(left_out)}{beside}."


def _existing(numbers: Mapping[str, Any]) -> list[str]:
    kept, k, new = numbers["kept"], numbers["k_for_share"], numbers["kept_of_new"]
    if kept is None and new is not None:
        said = f"The basis keeps {percent(new)} of the energy of these adapters, which it was not built from"
        random = numbers["random"]
        beside = "" if random is None else f", beside {percent(random)} that random directions keep of anything"
        return [f"{said}{beside}: {word(new)}. {meaning(numbers)}"]
    if kept is None:
        return []
    words = f"{_kept(numbers, at_least=bool(numbers.get('at_least')))} {COMPRESSED[word(kept)]}"
    if new is not None:
        words += f" Of the adapters here that it was not built from it keeps {percent(new)}"
        rank = numbers.get("extra_rank_of_new")
        words += f"; with {rank} directions of its own beside it each is faithful." if rank else "."
    if k is not None and word(kept) != "faithful":
        words += f" {percent(FAITHFUL)} take k={k} per side."
    even = numbers["break_even"]
    if numbers["bytes_per_lora"] is None:
        return [words]
    if even is None:
        return [f"{words} A task in it takes no fewer bytes than a LoRA, so the two are never smaller in all."]
    adapters = "adapter" if even == 1 else "adapters"
    return [f"{words} Basis and tasks are smaller in all than the LoRAs from {even:,} {adapters} on."]


def _new(numbers: Mapping[str, Any]) -> list[str]:
    left_out, random, mean = numbers[LEFT_OUT], numbers["random"], numbers["mean_only"]
    if of_others(numbers):
        words = f"For new tasks like these, that is what it holds. {new_meaning(numbers)}"
        if own_is_better(numbers):
            words += f" A basis of these adapters keeps {percent(left_out)} of one left out of it."
        return [words]
    if left_out is None and numbers["bytes_per_lora"] is None and (numbers["sources"] or 0) > 1:
        return [NOT_MEASURED]  # from the record alone
    if left_out is None:
        return [
            "Of adapters that it was not built from nothing can be said: there are too few sources of own seeds to"
            " leave one out. Pass more, sources= (--fleet)."
        ]
    words = f"{_left_out(numbers)} {new_meaning(numbers)}"
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
