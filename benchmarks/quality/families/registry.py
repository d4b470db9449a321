"""The families by name; importing this module makes their members tasks of the benchmark: ``groups/rec.autos``."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from .. import tasks
from . import images, texts
from .hidden import load as load_member
from .pools import Family

# name → kind, and what reads it; those that are measured first come first
MAKERS: dict[str, tuple[str, Callable[[], Family]]] = {
    "blanks": ("text", texts.blanks),
    "kinds": ("text", texts.kinds),
    "writers": ("text", texts.writers),
    "digits": ("image", images.digits),
    "groups": ("text", texts.groups),
    "clothes": ("image", images.clothes),
}


@cache
def family(name: str) -> Family:
    """Return a family. Raises `KeyError` for a name that none has."""
    if name not in MAKERS:
        raise KeyError(f"There is no family {name!r}; there are {', '.join(MAKERS)}.")
    return MAKERS[name][1]()


def load(name: str, folder: Path) -> tasks.EncodedTask:
    """Return the member ``family/member``; what the frozen layers make of its family is kept in `folder`."""
    of, _, member = name.partition("/")
    return load_member(family(of), member, folder)


for _name, (_kind, _) in MAKERS.items():
    tasks.FAMILIES[_name] = (_kind, load)
