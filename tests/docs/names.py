"""What a block of Python names, without running it: imports, attributes of modules, keyword arguments, variables."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
from collections.abc import Iterable
from typing import Any

MISSING = object()  # bound by a statement that was not run, or by a package that is not installed


def resolve(source: str, namespace: dict[str, Any], given: Iterable[str] = ()) -> list[str]:
    """Bind what `source` imports in `namespace`, and return what is wrong with its names.

    Names that are `given`, and those that the block assigns, are bound to `MISSING` where the page has not made them:
    later blocks may use them.
    """
    tree = ast.parse(source)
    faults: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            _import(node, namespace, faults)
        elif isinstance(node, ast.ImportFrom):
            _import_from(node, namespace, faults)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            faults += _attribute(node, namespace)
        elif isinstance(node, ast.Call):
            faults += _keywords(node, namespace)
    for name in (*given, *_assigned(tree)):
        namespace.setdefault(name, MISSING)
    arguments = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    known = arguments | namespace.keys() | vars(builtins).keys()
    faults += [f"nothing is called {name}" for name in _read(tree) - known]
    return sorted(set(faults))


def _import(node: ast.Import, namespace: dict[str, Any], faults: list[str]) -> None:
    for name in node.names:
        module = _module(name.name, faults)
        top = module if name.asname else _module(name.name.split(".")[0], faults)
        namespace[name.asname or name.name.split(".")[0]] = top


def _import_from(node: ast.ImportFrom, namespace: dict[str, Any], faults: list[str]) -> None:
    module = _module(node.module or "", faults)
    for name in node.names:
        found = MISSING
        if module is not MISSING:
            try:
                found = getattr(module, name.name, MISSING)
                if found is MISSING:
                    found = importlib.import_module(f"{node.module}.{name.name}")
            except ImportError:
                faults.append(f"{node.module} has no {name.name}")
        namespace[name.asname or name.name] = found


def _module(name: str, faults: list[str]) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # another package may be missing here; one that is there must have the module
        if error.name is None or error.name.split(".")[0] == "subspace_peft" or "." in error.name:
            faults.append(f"no module {name}")
        return MISSING


def _value(node: ast.expr, namespace: dict[str, Any]) -> Any:
    """Return what a dotted name is, if its first part is an imported module, class or function."""
    if isinstance(node, ast.Name):
        found = namespace.get(node.id, MISSING)
        known = inspect.ismodule(found) or inspect.isclass(found) or inspect.isroutine(found)
        return found if known else MISSING
    if isinstance(node, ast.Attribute):
        owner = _value(node.value, namespace)
        return MISSING if owner is MISSING else getattr(owner, node.attr, MISSING)
    return MISSING


def _attribute(node: ast.Attribute, namespace: dict[str, Any]) -> list[str]:
    owner = _value(node.value, namespace)
    if owner is MISSING or hasattr(owner, node.attr):
        return []
    return [f"{ast.unparse(node.value)} has no {node.attr}"]


def _keywords(node: ast.Call, namespace: dict[str, Any]) -> list[str]:
    called = _value(node.func, namespace)
    if called is MISSING:
        return []
    try:
        parameters = inspect.signature(called).parameters
    except (TypeError, ValueError):
        return []
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return []
    given = [keyword.arg for keyword in node.keywords if keyword.arg is not None]
    return [f"{ast.unparse(node.func)} takes no {name}=" for name in given if name not in parameters]


def _read(tree: ast.Module) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def _assigned(tree: ast.Module) -> set[str]:
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    defined = {
        node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    }
    return stored | defined
