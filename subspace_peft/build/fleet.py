"""The fleet as a whole: opened, checked, every problem reported at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from ..errors import SourceError
from .reading import scan
from .reading import shape as shape_of
from .seed_groups import seed_groups
from .sources import Source, is_one_source, open_source

RESERVED = ("zero", "mean")  # what `SubspaceConfig.start` means by these is no source


@dataclass(frozen=True, eq=False)
class Fleet:
    """Checked sources.

    Attributes:
        sources: the usable ones, under unique names.
        modules: the target modules, sorted by their place in the first source that has them.
        groups: per source the number of its shared-seed group.
        skipped: ``{"name", "location", "reason"}`` of each source left out.
    """

    sources: list[Source]
    modules: list[str]
    groups: list[int]
    skipped: list[dict[str, str]]

    @property
    def base_model(self) -> str | None:
        return next((source.base_model for source in self.sources if source.base_model), None)

    def votes(self, members: Sequence[int]) -> list[float]:
        """Per member source 1 / (how many members are of its shared-seed group)."""
        groups = [self.groups[i] for i in members]
        sizes = Counter(groups)
        return [1.0 / sizes[group] for group in groups]


def gather(
    references: Iterable[Any], *, skip_bad: bool, partial: bool, token: str | bool | None, progress: bool
) -> Fleet:
    """Open every source and check it against the others.

    Args:
        references: what `open_source` takes, one or a list of them.
        skip_bad: leave bad sources out, each with its reason, instead of raising.
        partial: allow modules that only some of the sources adapt.

    Raises:
        SourceError: no usable source, or bad ones; lists them all.
    """
    opened: list[Source] = []
    bad: list[dict[str, str]] = []
    listed = [references] if is_one_source(references) else list(references)
    for reference in tqdm(listed, desc="reading sources", unit="adapter", delay=2, disable=not progress):
        try:
            source = open_source(reference, token=token)
            scan(source)
            if not any(source.norms.values()):
                raise SourceError(
                    f"{source.location}: every lora_B is zero, so the adapter does nothing. Leave it out."
                )
            opened.append(source)
        except SourceError as error:
            name = reference if isinstance(reference, str) else type(reference).__name__
            bad.append({"name": str(name), "location": str(name), "reason": str(error)})
    _unify_names(opened)
    for source, reason in _misfits(opened, partial):
        opened.remove(source)
        bad.append({"name": source.name, "location": source.location, "reason": reason})
    if bad and not skip_bad:
        lines = "\n  ".join(entry["reason"] for entry in bad)
        raise SourceError(
            f"{len(bad)} of {len(listed)} sources cannot be used:\n  {lines}\nMend or remove them, or leave them out "
            "with skip_bad=True (--skip-bad)."
        )
    if not opened:
        raise SourceError(
            "There is no source adapter to build from." + "".join(f"\n  {entry['reason']}" for entry in bad)
        )
    modules = list(dict.fromkeys(module for source in opened for module in source.keys))
    return Fleet(opened, modules, seed_groups(opened, modules), bad)


def _misfits(sources: list[Source], partial: bool) -> list[tuple[Source, str]]:
    """Sources that do not belong with the majority, with the reason."""
    bases = Counter(source.base_model for source in sources if source.base_model)
    base = max(bases, key=bases.__getitem__) if bases else None
    counts = Counter(frozenset(source.keys) for source in sources)
    common: frozenset[str] = max(counts, key=counts.__getitem__) if counts else frozenset()
    shapes: dict[str, tuple[int, int]] = {}
    found = []
    for source in sources:
        if source.base_model and source.base_model != base:
            found.append((source, f"{source.location}: trained on {source.base_model!r}, the others on {base!r}."))
        elif not partial and source.keys.keys() != common:
            missing, extra = sorted(common - source.keys.keys()), sorted(source.keys.keys() - common)
            what = f"lacks {len(missing)} modules, such as {missing[0]!r}" if missing else f"also adapts {extra[0]!r}"
            found.append(
                (
                    source,
                    f"{source.location}: {what}, unlike the others. partial=True (--partial) builds each module "
                    "from the sources that have it.",
                )
            )
        else:
            for module in source.keys:
                shape = shape_of(source, module)[:2]
                if shapes.setdefault(module, shape) != shape:
                    found.append(
                        (
                            source,
                            f"{source.location}: module {module!r} is {shape}, the others' {shapes[module]}. It "
                            "belongs to another base model.",
                        )
                    )
                    break
    return found


def _unify_names(sources: list[Source]) -> None:
    """Unique source names, and one name per module: a task head adds a prefix, ``bert.encoder…`` for ``encoder…``."""
    taken = set(RESERVED)
    given = {source.name for source in sources}
    for source in sources:
        name, number = source.name, 1
        while name in taken or (number > 1 and name in given):
            number += 1
            name = f"{source.name}-{number}"
        source.name = name
        taken.add(name)
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
