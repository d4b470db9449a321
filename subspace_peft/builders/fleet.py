"""A fleet of sources: opened, checked against one another, every problem reported at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..base_names import common_name, names_record
from ..errors import HubOfflineError, SourceError
from ..hub_requests import patient
from ..sources.guesses import warn_of_guesses
from ..sources.references import expand
from ..sources.source import Source
from ..sources.trained_tokens import warn_of_tokens
from .distributed import ALONE, ProcessGroup
from .fleet_checks import Misfit, misfits, repeats
from .fleet_names import unify_modules, unify_names
from .scan_fleet import scan_fleet
from .seed_groups import seed_groups


@dataclass(frozen=True, eq=False)
class Fleet:
    """Checked sources.

    Attributes:
        sources: the usable ones, under unique names.
        modules: the target modules, sorted by their place in the first source that has them.
        groups: per source the number of its shared-seed group.
        skipped: ``{"name", "location", "reason"}`` of each source left out.
        weights: per source how often it counts; None where all count alike.
    """

    sources: list[Source]
    modules: list[str]
    groups: list[int]
    skipped: list[dict[str, str]]
    weights: list[float] | None = None

    @property
    def base_model(self) -> str | None:
        """The base model that most sources name, or None."""
        return common_name(source.base_model for source in self.sources)

    def base_names(self) -> dict[str, Any]:
        """Return what a basis records of the names that the sources give their base model, see `names_record`."""
        said = any(source.said_base for source in self.sources)
        return names_record({source.name: source.given_base for source in self.sources}, self.base_model, said)

    def source_weights(self, members: Sequence[int]) -> list[float]:
        """Return how much each of some sources counts: its weight / (how many of them are of its seed group).

        Args:
            members: places of the sources.
        """
        groups = [self.groups[i] for i in members]
        sizes = Counter(groups)
        own = [1.0 if self.weights is None else self.weights[i] for i in members]
        return [weight / sizes[group] for weight, group in zip(own, groups, strict=True)]


def gather(
    references: Iterable[Any],
    *,
    skip_bad: bool,
    partial: bool,
    token: str | bool | None,
    progress: bool,
    allow_bin: bool = False,
    base_model: nn.Module | None = None,
    base_model_name: str | None = None,
    keep_duplicates: bool = False,
    processes: ProcessGroup = ALONE,
    judge: Callable[[Source], str | None] | None = None,
    alone: Callable[[Source], bool] = lambda source: False,
    taken: Iterable[str] = (),
) -> Fleet:
    """Open every source and check it against the others.

    Args:
        references: one or several, as `expand` takes them.
        skip_bad: leave bad sources out, each with its reason, instead of raising.
        partial: allow modules that only some of the sources adapt.
        token: as in huggingface_hub.
        progress: show a bar where it takes longer than two seconds.
        allow_bin: as in `open_source`.
        base_model: as in `open_source`.
        base_model_name: the one base model that all of them are of, whatever they say; None: what they say.
        keep_duplicates: do not look for sources that repeat another one.
        processes: the processes that do this together; each returns the same.
        judge: source → a further reason to leave it out, or None.
        alone: source → whether it may adapt other modules than the others do, `partial` or not.
        taken: names that sources may not have.

    Raises:
        SourceError: no usable source, or bad ones; lists them all.
        HubUnavailableError: the Hub does not answer, or may not be asked; nothing is skipped for that.
    """
    with patient():
        listed, bad = expand(references, token=token)
    count = len(listed) + len(bad)
    scanned = scan_fleet(
        listed, processes=processes, progress=progress, token=token, allow_bin=allow_bin, base_model=base_model
    )
    bad += scanned.bad()
    # in the order listed, whichever process read them
    opened = {number: scanned.sources[number] for number in sorted(scanned.sources)}
    unify_modules(list(opened.values()))
    if base_model_name is not None:
        for source in opened.values():
            source.said_base = base_model_name

    def leave_out(found: Iterable[Misfit]) -> None:
        for number, reason in found:
            source = opened.pop(number)
            bad.append({"name": source.name, "location": source.location, "reason": f"{source.location}: {reason}"})

    # one after the other: a source that is left out is not held against the rest
    leave_out(misfits(opened, partial, alone))
    if not keep_duplicates:
        leave_out(repeats(opened, scanned.sketches))
    if judge is not None:
        leave_out([(number, why) for number, source in opened.items() if (why := judge(source)) is not None])
    sources = list(opened.values())
    _raise_bad(bad, count, empty=not sources, skip_bad=skip_bad, offline=len(scanned.offline))
    if processes.main:
        warn_of_guesses(sources)
        warn_of_tokens(sources)
    unify_names(sources, taken)
    modules = list(dict.fromkeys(module for source in sources for module in source.keys))
    return Fleet(sources, modules, seed_groups(sources, modules), bad)


def _raise_bad(bad: Sequence[dict[str, str]], count: int, *, empty: bool, skip_bad: bool, offline: int) -> None:
    """Raise `SourceError` where sources are bad and may not be skipped, or none is left.

    `offline` of them are not known to be bad, and are never skipped: the Hub may not be asked for them.
    """
    if offline:
        lines = "\n  ".join(entry["reason"] for entry in bad)
        raise HubOfflineError(f"{len(bad)} of {count} sources cannot be used:\n  {lines}\nMend or fetch them.")
    if bad and (empty or not skip_bad):
        lines = "\n  ".join(entry["reason"] for entry in bad)
        # leaving all of them out would leave nothing
        remedy = "" if empty else ", or leave them out with skip_bad=True (--skip-bad)"
        raise SourceError(f"{len(bad)} of {count} sources cannot be used:\n  {lines}\nMend or remove them{remedy}.")
    if empty:
        raise SourceError("There is no source adapter to build from. Give at least one.")
