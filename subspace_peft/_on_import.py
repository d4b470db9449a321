"""Run a function once a module has been imported: now if it is, else right after its import finishes."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


def when_imported(name: str, function: Callable[[], None]) -> None:
    """Call `function` as soon as the top-level module `name` is fully imported.

    It is called at once where the module is there; when the import ends where that has begun (then something in it
    imports us) or is yet to come; and never where the import fails.
    """
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    if module is None:
        sys.meta_path.insert(0, _Finder(name, function))
    elif getattr(spec, "_initializing", False):
        _at_the_end(spec, function)
    else:
        function()


def _at_the_end(spec: importlib.machinery.ModuleSpec, function: Callable[[], None]) -> None:
    """Call `function` when the import of the module with that `spec` ends, which is under way."""
    kind = type(spec)

    # Python's last step is to clear this mark, whether the import has worked or not
    class Watched(kind):  # type: ignore[misc, valid-type]
        def __setattr__(self, key: str, value: Any) -> None:
            super().__setattr__(key, value)
            if key == "_initializing" and not value:
                self.__class__ = kind
                if self.name in sys.modules:
                    function()

    spec.__class__ = Watched


class _Finder(importlib.abc.MetaPathFinder):
    """Find one module as the other finders do, and have a function called when it has been executed."""

    def __init__(self, name: str, function: Callable[[], None]) -> None:
        self.name = name
        self.function = function
        self.searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec that the other finders find, with a loader that calls the function at its end."""
        if fullname != self.name or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is None or spec.loader is None:
            return spec
        run, function = spec.loader.exec_module, self.function

        def exec_module(module: ModuleType) -> None:
            run(module)
            # only now: others probe with find_spec, as transformers does, and throw the spec away
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            function()

        # the loader object is this spec's own: shadowing its method changes no other import
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
