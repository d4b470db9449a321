"""The package's layers, by every import in its source: at the top, inside functions and for typing alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "subspace_peft"
TEXTS = {"_install", "_shown"}
GROUND = TEXTS | {"errors", "energy", "_io", "_version", "_adapted", "_lazy", "_moved", "logging", "base_names"}
HUB = {"hub", "hub_requests"}
BASIS = GROUND | HUB | {"cards", "basis"}
# layer → the layers that it may import; docs/architecture.md says why
LAYERS: dict[str, set[str]] = {
    **{
        layer: set()
        for layer in ("_install", "errors", "energy", "_version", "_adapted", "_lazy", "_moved", "modeling")
    },
    "_shown": {"energy"},
    "_io": {"errors", "logging"},
    "logging": {"errors"},
    "base_names": {"errors"},
    "hub_requests": GROUND,
    "hub": GROUND | HUB,
    "cards": GROUND | HUB,
    "basis": BASIS,
    "sources": BASIS | {"tuner", "tasks"},
    "builders": BASIS | {"sources", "tuner", "tasks"},
    "tuner": BASIS,
    "tasks": BASIS | {"tuner"},
    "convert": BASIS | {"sources", "builders", "tuner", "tasks"},
    "bundle": BASIS | {"sources", "tuner", "tasks", "convert"},
    "serve": BASIS | {"tuner", "tasks", "convert", "bundle"},
    "report": BASIS | {"sources", "builders", "tuner", "tasks", "convert"},
    "continual": BASIS | {"sources", "builders", "tuner", "tasks", "convert", "report"},
    "_peft_hooks": BASIS | {"tuner", "tasks"},
}
# above all of these: nothing in a layer imports them
TOP = {"cli", "recipes", "_on_import", "run", "__main__", "subspace_peft"}


def import_graph(package: Path) -> dict[str, set[str]]:
    """Return every module of a package with the modules of the package that it imports, wherever it does so."""
    files = {}
    for file in package.rglob("*.py"):
        parts = file.relative_to(package.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file

    def imports(name: str) -> Iterator[str]:
        inside = name.split(".") if files[name].name == "__init__.py" else name.split(".")[:-1]
        for node in ast.walk(ast.parse(files[name].read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                above = inside[: len(inside) + 1 - node.level] if node.level else []
                module = ".".join([*above, *filter(None, [node.module])])
                for alias in node.names:
                    yield f"{module}.{alias.name}" if f"{module}.{alias.name}" in files else module

    return {name: {other for other in imports(name) if other in files and other != name} for name in files}


def layer_of(module: str) -> str:
    """Return the second part of a module's name; of the package itself, its name."""
    return module.split(".")[1] if "." in module else module


def problems(graph: dict[str, set[str]], layers: dict[str, set[str]]) -> list[str]:
    """Return a circle, if there is one, and every import that goes up or to a layer that is not listed."""
    found = []
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append("circle: " + " → ".join(reversed(error.args[1])))
    for name, others in sorted(graph.items()):
        layer = layer_of(name)
        if layer not in layers:
            continue
        for other in sorted(others):
            wanted = layer_of(other)
            if wanted not in layers[layer] | {layer}:
                found.append(f"layer: {name} imports {other}")
    return found


def test_no_circle_and_no_import_goes_up():
    graph = import_graph(PACKAGE)
    assert {layer_of(name) for name in graph} == set(LAYERS) | TOP
    assert problems(graph, LAYERS) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("from . import b", "def late():\n    from pkg.low.a import thing"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import B", "import pkg.low.a"),
    ],
)
def test_a_planted_circle_is_found(tmp_path, one, other):
    for file, text in {"__init__": "", "low/__init__": "", "low/a": one, "low/b": other}.items():
        (tmp_path / "pkg" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pkg" / f"{file}.py").write_text(text)
    (found,) = problems(import_graph(tmp_path / "pkg"), {"low": set()})
    assert found.startswith("circle: ") and "pkg.low.a" in found and "pkg.low.b" in found


def test_a_planted_import_of_a_higher_layer_is_found(tmp_path):
    for file, text in {"__init__": "", "low": "def late():\n    from .high import x, y", "high": "x = y = 1"}.items():
        (tmp_path / "pkg").mkdir(exist_ok=True)
        (tmp_path / "pkg" / f"{file}.py").write_text(text)
    assert problems(import_graph(tmp_path / "pkg"), {"low": set(), "high": set()}) == [
        "layer: pkg.low imports pkg.high"
    ]
