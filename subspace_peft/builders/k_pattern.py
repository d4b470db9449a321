"""Another k for some modules of a basis: which modules the patterns name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ..errors import SubspaceError


def sizes_by_pattern(pattern: Mapping[str, int] | None, modules: Iterable[str]) -> dict[str, int]:
    """Return module → k of those that a pattern names: by the whole name, else its end, else a regular expression.

    As in PEFT's ``rank_pattern``, of several patterns that fit the first one counts, but a whole name before all.

    Args:
        pattern: name, end of a name or regular expression → k; None for none.
        modules: all modules of the basis.

    Raises:
        SubspaceError: one of the patterns fits no module.
    """
    if not pattern:
        return {}
    found, used = {}, set()
    modules = list(modules)
    for name in modules:
        keys = [key for key in pattern if _fits(key, name)]
        if keys:
            # a pattern is in use where it fits, though another one comes first
            used.update(keys)
            found[name] = pattern[name if name in pattern else keys[0]]
    if idle := [key for key in pattern if key not in used]:
        raise SubspaceError(
            f"k_pattern: {', '.join(map(repr, idle))} fits none of the {len(modules)} modules, such as {modules[0]!r}."
            " Give a module's name, the end of it, or a regular expression."
        )
    return found


def _fits(key: str, name: str) -> bool:
    if key == name or name.endswith(f".{key}"):
        return True
    try:
        return re.fullmatch(rf"(?:.*\.)?(?:{key})", name) is not None
    except re.error:
        return False
