"""Give a fleet's sources unique names, and its modules one name each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..sources.source import Source

RESERVED = ("zero", "mean")  # values of `SubspaceConfig.start` that name no source


def unify_names(sources: Sequence[Source], others: Iterable[str]) -> None:
    """Rename sources so that names are unique.

    Args:
        sources: get their new ``name``.
        others: names that sources may not have.
    """
    taken = {*RESERVED, *others}
    given = {source.name for source in sources}
    for source in sources:
        name, number = source.name, 1
        while name in taken or (number > 1 and name in given):
            number += 1
            name = f"{source.name}-{number}"
        source.name = name
        taken.add(name)


def unify_modules(sources: Sequence[Source]) -> None:
    """Rename modules so that each has one name: a task head adds a prefix, ``bert.encoder…`` for ``encoder…``.

    Args:
        sources: get their new ``keys`` and ``norms``, and ``aliases`` for the names of their own.
    """
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
