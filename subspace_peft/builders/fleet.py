"""The fleet as a whole: opened, checked, every problem reported at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..errors import SourceError
from ..hub import same_model
from ..sources.open import open_source
from ..sources.references import expand
from ..sources.source import IN_MEMORY, Source
from .distributed import ALONE, ProcessGroup
from .distributed_scans import share_scans
from .duplicates import drawn, duplicates
from .scan import scan, skim
from .seed_groups import seed_groups

RESERVED = ("zero", "mean")  # what `SubspaceConfig.start` means by these is no source


@dataclass(frozen=True, eq=False)
class Fleet:
    """Checked sources.

    Attributes:
        sources: the usable ones, under unique names.
        modules: the target modules, sorted by their place in the first source that has them.
        groups: per source the number of its shared-seed group.
        skipped: ``{"name", "location", "reason"}`` of each source left out.
        weights: per source how much its vote counts; None where all count alike.
    """

    sources: list[Source]
    modules: list[str]
    groups: list[int]
    skipped: list[dict[str, str]]
    weights: list[float] | None = None

    @property
    def base_model(self) -> str | None:
        return common_base([source.base_model for source in self.sources])

    def source_weights(self, members: Sequence[int]) -> list[float]:
        """Per member source its weight / (how many members are of its shared-seed group)."""
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
    keep_duplicates: bool = False,
    processes: ProcessGroup = ALONE,
    judge: Callable[[Source], str | None] | None = None,
    taken: Iterable[str] = (),
) -> Fleet:
    """Open every source and check it against the others.

    The processes of one machine divide the reading of the files among them; each machine reads all of them once, so
    that files of machines that share no disk are held against one another by their sha256.

    Args:
        references: what `expand` takes, one or a list of them.
        skip_bad: leave bad sources out, each with its reason, instead of raising.
        partial: allow modules that only some of the sources adapt.
        allow_bin, base_model: as in `open_source`.
        keep_duplicates: leave it to the caller to look at them.
        processes: the processes that do this together; each returns the same.
        judge: source → a further reason to leave it out, or None.
        taken: names that sources may not have.

    Raises:
        SourceError: no usable source, or bad ones; lists them all.
    """
    found_open: dict[int, Source] = {}
    measured: dict[int, torch.Tensor] = {}
    reasons: dict[int, str] = {}
    listed, bad = expand(references, token=token)
    count = len(listed) + len(bad)
    neighbours = processes.neighbours
    bar = tqdm(listed, desc="reading sources", unit="adapter", delay=2, disable=not (progress and processes.main))
    for number, reference in enumerate(bar, 1):
        try:
            source = open_source(reference, token=token, allow_bin=allow_bin, base_model=base_model)
            if source.location == IN_MEMORY:
                source.location = f"{IN_MEMORY}, number {number}"
            if processes.index == neighbours[number % len(neighbours)]:
                measured[number] = _measure(source)
            else:
                skim(source)
            found_open[number] = source
        except SourceError as error:
            reasons[number] = str(error)
    drawn.cache_clear()
    if processes.count > 1:
        share_scans(processes, [_named(reference) for reference in listed], found_open, measured, reasons)
    for number in sorted(reasons):
        found_open.pop(number, None)
        name = _named(listed[number - 1])
        bad.append({"name": name, "location": name, "reason": reasons[number]})
    opened = [found_open[number] for number in sorted(found_open)]
    sketches = {id(source): measured[number] for number, source in found_open.items()}
    _unify_modules(opened)
    found = _misfits(opened, partial)
    if not keep_duplicates:
        fitting = [source for source in opened if all(source is not misfit for misfit, _ in found)]
        found += _repeats(fitting, [sketches[id(source)] for source in fitting])
    if judge is not None:
        fitting = [source for source in opened if all(source is not misfit for misfit, _ in found)]
        found += [
            (source, f"{source.location}: {reason}") for source in fitting if (reason := judge(source)) is not None
        ]
    for source, reason in found:
        opened.remove(source)
        bad.append({"name": source.name, "location": source.location, "reason": reason})
    if bad and not skip_bad:
        lines = "\n  ".join(entry["reason"] for entry in bad)
        raise SourceError(
            f"{len(bad)} of {count} sources cannot be used:\n  {lines}\nMend or remove them, or leave them out "
            "with skip_bad=True (--skip-bad)."
        )
    if not opened:
        raise SourceError(
            "There is no source adapter to build from." + "".join(f"\n  {entry['reason']}" for entry in bad)
        )
    _unify_names(opened, taken)
    modules = list(dict.fromkeys(module for source in opened for module in source.keys))
    return Fleet(opened, modules, seed_groups(opened, modules), bad)


def _named(reference: Any) -> str:
    if isinstance(reference, Source):
        return reference.location
    return str(reference) if isinstance(reference, (str, Path)) else type(reference).__name__


def _measure(source: Source) -> torch.Tensor:
    """Read a source once: its hash, shapes and norms; returns what `scan` does."""
    if source.biases:
        raise SourceError(
            f"{source.location}: {source.biases[0]}: it was trained with bias={source.config['bias']!r}"
            f" ({len(source.biases)} biases), which no basis holds, and without which it is another adapter. Train it"
            " with bias='none'."
        )
    sketches = scan(source)
    if not any(source.norms.values()):
        raise SourceError(f"{source.location}: every lora_B is zero, so the adapter does nothing. Leave it out.")
    return sketches


def _repeats(sources: list[Source], sketches: list[torch.Tensor]) -> list[tuple[Source, str]]:
    found = []
    for i, j, value in duplicates(sources, sketches):
        how = "the same bytes (sha256)" if value is None else f"cosine of the updates {value:.5f}"
        first = f"{sources[j].location}{'@' + sources[j].revision[:12] if sources[j].revision else ''}"
        found.append(
            (sources[i], f"{sources[i].location}: a duplicate of {first}: {how}. It would count twice; list it once.")
        )
    return found


def common_base(names: Sequence[str | None]) -> str | None:
    """The base model that most sources name, with its owner where one of them says it; names of one model count as
    one."""
    counts = Counter(name for name in names if name)

    def votes(name: str) -> int:
        others = [count for other, count in counts.items() if other != name and same_model(name, other)]
        # an id without an owner may be several models' older form: it goes with one of them only
        return counts[name] + (sum(others) if "/" in name else max(others, default=0))

    return max(counts, key=lambda name: (votes(name), "/" in name), default=None)


def _misfits(sources: list[Source], partial: bool) -> list[tuple[Source, str]]:
    """Sources that do not belong with the majority, with the reason."""
    base = common_base([source.base_model for source in sources])
    counts = Counter(frozenset(source.keys) for source in sources)
    common: frozenset[str] = max(counts, key=counts.__getitem__) if counts else frozenset()
    shapes: dict[str, Counter[tuple[int, int]]] = {}
    for source in sources:
        for module in source.keys:
            shapes.setdefault(module, Counter())[source.shape(module)[:2]] += 1
    usual = {module: each.most_common(1)[0][0] for module, each in shapes.items()}
    found = []
    for source in sources:
        own = {module: source.shape(module)[:2] for module in source.keys}
        missing, extra = sorted(common - source.keys.keys()), sorted(source.keys.keys() - common)
        odd = [module for module, shape in own.items() if shape != usual[module]]
        if not same_model(source.base_model, base):
            reason = (
                f"trained on {source.base_model!r}, the others on {base!r}. If that is the same model, mend "
                "base_model_name_or_path in its adapter_config.json."
            )
        elif odd:
            reason = (
                f"module {odd[0]!r} is {own[odd[0]]}, the others' {usual[odd[0]]} ({len(odd)} such modules). It"
                " belongs to another base model."
            )
        elif not partial and (missing or extra):
            what = f"lacks {len(missing)} modules, such as {missing[0]!r}" if missing else f"also adapts {extra[0]!r}"
            reason = (
                f"{what}, unlike the others. partial=True (--partial) builds each module from the sources that"
                " have it."
            )
        else:
            continue
        found.append((source, f"{source.location}: {reason}"))
    return found


def _unify_names(sources: list[Source], others: Iterable[str]) -> None:
    """Unique source names, none of them of `others`."""
    taken = {*RESERVED, *others}
    given = {source.name for source in sources}
    for source in sources:
        name, number = source.name, 1
        while name in taken or (number > 1 and name in given):
            number += 1
            name = f"{source.name}-{number}"
        source.name = name
        taken.add(name)


def _unify_modules(sources: list[Source]) -> None:
    """One name per module: a task head adds a prefix, ``bert.encoder…`` for ``encoder…``."""
    names = sorted({module for source in sources for module in source.keys}, key=len)
    short = {name: next((s for s in names if s != name and name.endswith(f".{s}")), name) for name in names}
    # a one-part name such as "lin" would swallow every "x.lin": prefixes are dropped only from real paths
    short = {name: s if "." in s else name for name, s in short.items()}
    for source in sources:
        renamed = {short[module]: sides for module, sides in source.keys.items()}
        if len(renamed) == len(source.keys) and renamed.keys() != source.keys.keys():
            source.norms = {short[module]: norm for module, norm in source.norms.items()}
            source.aliases = {short[module]: module for module in source.keys}
            source.keys = renamed
