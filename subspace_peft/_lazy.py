"""Names of a package that are loaded when they are first used: what `__init__` modules put in their own place.

Type checkers read the imports under ``if TYPE_CHECKING`` and the literal ``__all__`` beside them, and must not see the
`__getattr__`: a module with one has every name to them, misspelled ones too. `tests/test_public_names.py` holds the
three lists against one another.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def collecting_later() -> Iterator[None]:
    """Import within without looking for garbage: PEFT's import makes half a million objects that stay.

    Python would go through them over and over, a fifth of that import's time.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def attach(
    package: str, places: Mapping[str, str], modules: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the `__getattr__` and `__dir__` of a package whose names are loaded when they are first used.

    Args:
        package: its name.
        places: public name → the module in the package that defines it.
        modules: modules of the package that are attributes without an import of their own. They are in `dir()`, not
            in ``__all__``.
    """
    own = frozenset(modules)
    listed = sorted({*places, *own, *getattr(sys.modules[package], "__all__", ())})

    def get(name: str) -> Any:
        if name in places:
            with collecting_later():
                value = getattr(importlib.import_module(f".{places[name]}", package), name)
        elif name in own:
            with collecting_later():
                value = importlib.import_module(f".{name}", package)
        else:
            import difflib

            near = difflib.get_close_matches(name, listed, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            # `obj` is given since Python would look for a near name itself, and say it a second time
            raise AttributeError(f"module {package!r} has no attribute {name!r}{meant}", name=name, obj=None)
        vars(sys.modules[package])[name] = value
        return value

    def names() -> list[str]:
        return list(listed)

    return get, names
