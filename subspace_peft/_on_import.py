"""Run a function once a module has been imported: now if it is, else right after its import finishes."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def when_imported(name: str, function: Callable[[], None]) -> None:
    """Call `function` as soon as top-level module `name` is fully imported.

    While that module is being imported (then it is the one that imports us), nothing is done: whatever needs the
    function has to call it, as the tuner's own room does.
    """
    module = sys.modules.get(name)
    if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
        function()
    elif module is None:
        sys.meta_path.insert(0, _Finder(name, function))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, function: Callable[[], None]) -> None:
        self.name = name
        self.function = function
        self.searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
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
