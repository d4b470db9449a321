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

    A module that is being imported at this moment counts as not imported yet only through its own spec's
    `_initializing` flag; then, too, the function runs at the end, by way of the first attribute that needs it.
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

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            sys.meta_path.insert(0, self)
            return spec
        run, function = spec.loader.exec_module, self.function

        def exec_module(module: ModuleType) -> None:
            run(module)
            function()

        # the loader object is this spec's own: shadowing its method changes no other import
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
