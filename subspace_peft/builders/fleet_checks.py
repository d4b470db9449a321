"""Check the sources of a fleet against one another: base model, modules, shapes, duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch

from ..base_names import REMEDY, common_name, difference, majority, same_model
from ..sources.source import Source
from .duplicates import duplicates

Misfit = tuple[int, str]  # a source's number, and the reason to leave it out


def misfits(
    sources: Mapping[int, Source], partial: bool, alone: Callable[[Source], bool] = lambda source: False
) -> list[Misfit]:
    """Return the sources that do not belong with the majority.

    Args:
        sources: number → source, with its module names unified.
        partial: allow modules that only some of the sources adapt.
        alone: source → whether it may adapt other modules than the others do all the same.
    """
    named = [source.base_model for source in sources.values()]
    base, tied = majority(named), majority(named) is None and common_name(named) is not None
    kinds = {frozenset(source.keys) for source in sources.values()}
    held = [] if partial or len(kinds) < 2 else [number for number, source in sources.items() if not alone(source)]
    counts = Counter(frozenset(sources[number].keys) for number in held)
    common: frozenset[str] = max(counts, key=counts.__getitem__) if counts else frozenset()
    shapes: dict[str, Counter[tuple[int, int]]] = {}
    for source in sources.values():
        for module in source.keys:
            shapes.setdefault(module, Counter())[source.shape(module)[:2]] += 1
    usual = {module: each.most_common(1)[0][0] for module, each in shapes.items()}
    found = []
    for number, source in sources.items():
        reason = _no_majority(source, named) if tied else _other_model(source, base, usual)
        reason = reason or (_other_modules(source, common) if number in held else None)
        if reason is not None:
            found.append((number, reason))
    return found


def _other_model(source: Source, base: str | None, usual: Mapping[str, tuple[int, int]]) -> str | None:
    """Return why a source belongs to another base model than the others; `usual` has each module's (out, in)."""
    if not same_model(source.base_model, base):
        return (
            f"trained on {source.base_model!r}, the others on {base!r}:"
            f" {difference(str(source.base_model), str(base))}. {REMEDY}"
        )
    own = {module: source.shape(module)[:2] for module in source.keys}
    odd = [module for module, shape in own.items() if shape != usual[module]]
    if odd:
        return (
            f"module {odd[0]!r} is {own[odd[0]]}, the others' {usual[odd[0]]} ({len(odd)} such modules). It"
            " belongs to another base model."
        )
    return None


def _no_majority(source: Source, names: Sequence[str | None]) -> str | None:
    """Return why a source cannot be used in a fleet of which no base model has more sources than any other."""
    if source.base_model is None:
        return None
    other = next(name for name in names if not same_model(source.base_model, name))
    return (
        f"trained on {source.base_model!r}, others on {other!r}: {difference(source.base_model, str(other))}. No base"
        f" model has more sources than any other. {REMEDY}"
    )


def _other_modules(source: Source, common: frozenset[str]) -> str | None:
    """Return which modules a source lacks, or has beside those of most others."""
    missing, extra = sorted(common - source.keys.keys()), sorted(source.keys.keys() - common)
    if not missing and not extra:
        return None
    difference = f"lacks {len(missing)} modules, such as {missing[0]!r}" if missing else f"also adapts {extra[0]!r}"
    return (
        f"{difference}, unlike the others. partial=True (--partial) builds each module from the sources that have it."
    )


def repeats(sources: Mapping[int, Source], sketches: Mapping[int, torch.Tensor]) -> list[Misfit]:
    """Return the sources that are the same adapter as an earlier one.

    Args:
        sources: number → source.
        sketches: number → its sketches, see `duplicates`.
    """
    numbers, listed = list(sources), list(sources.values())
    found = []
    for i, j, value in duplicates(listed, [sketches[number] for number in numbers]):
        how = "the same bytes (sha256)" if value is None else f"cosine of the updates {value:.5f}"
        first = f"{listed[j].location}{'@' + listed[j].revision[:12] if listed[j].revision else ''}"
        found.append((numbers[i], f"a duplicate of {first}: {how}. It would count twice; list it once."))
    return found
