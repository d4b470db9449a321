"""The public names: one list for `import *`, `dir()`, tab completion, type checkers and the first use of each."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import subspace_peft
from subspace_peft.tuner import config_fields

LAZY = [
    "subspace_peft",
    *(f"subspace_peft.{name}" for name in ("basis", "builders", "bundle", "continual", "convert", "report", "serve")),
]
PACKAGES = [*LAZY, *(f"subspace_peft.{name}" for name in ("cards", "tasks", "tuner"))]


def typed_names(package: str) -> set[str]:
    """Return what a type checker sees: the names imported under ``if TYPE_CHECKING``."""
    tree = ast.parse(Path(importlib.import_module(package).__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    return {alias.asname or alias.name for node in block.body for alias in node.names}


@pytest.mark.parametrize("package", LAZY)
def test_the_lists_of_a_package_agree(package):
    module = importlib.import_module(package)
    own = set(module.__all__) - {"__version__"}
    assert getattr(module, "_PLACES", {"TaskExports": "exports"}).keys() == own
    assert list(module.__all__) == sorted(module.__all__)
    modules = {name for name in dir(module) if name not in module.__all__}
    assert typed_names(package) == own | modules
    # what is completed beside the names are modules, of the package itself alone
    assert modules == (
        {name for name in modules if importlib.util.find_spec(f"{package}.{name}")}
        if package == "subspace_peft"
        else set()
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_do_not_see_what_answers_to_every_name(package):
    tree = ast.parse(Path(importlib.import_module(package).__file__).read_text(encoding="utf-8"))
    seen = [node for node in tree.body if not (isinstance(node, ast.If) and "not TYPE_CHECKING" in ast.unparse(node))]
    assert hasattr(importlib.import_module(package), "__getattr__")
    assert not [node for node in seen if "__getattr__" in ast.unparse(node)]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_is_there_and_no_module_takes_its_place(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        first = getattr(module, name)
        if importlib.util.find_spec(f"{package}.{name}"):
            importlib.import_module(f"{package}.{name}")
        assert getattr(module, name) is first
        assert not hasattr(first, "__path__") and type(first).__name__ != "module", name


def test_an_editor_completes_the_fields_of_the_configuration():
    # a decorator that returns `Any` makes that of the class, and no argument is checked or completed
    types = config_fields.with_field_texts.__annotations__
    assert types["cls"] == types["return"] == "type[T]"


def test_everything_is_imported_by_a_star():
    names: dict = {}
    exec("from subspace_peft import *", names)
    assert {name for name in names if not name.startswith("__") or name == "__version__"} == set(subspace_peft.__all__)
    assert {name for name in subspace_peft.__all__ if name not in dir(subspace_peft)} == set()


@pytest.mark.parametrize(
    ("package", "wrong", "meant"),
    [
        ("subspace_peft", "build_bases", "did you mean 'build_basis'?"),
        ("subspace_peft", "SubspaceConfg", "did you mean 'SubspaceConfig'?"),
        ("subspace_peft.report", "inspect_paths", "did you mean 'inspect_path'?"),
        ("subspace_peft", "xyzzy", "has no attribute 'xyzzy'"),
    ],
)
def test_a_wrong_name_is_answered_with_a_near_one_once(package, wrong, meant):
    with pytest.raises(AttributeError) as error:
        getattr(importlib.import_module(package), wrong)
    assert str(error.value).endswith(meant) and not hasattr(importlib.import_module(package), wrong)
    # and a traceback's own suggestion does not say it again
    shown = subprocess.run(
        [sys.executable, "-c", f"import {package}\n{package}.{wrong}"], capture_output=True, text=True, check=False
    ).stderr
    assert shown.lower().count("did you mean") == meant.count("did you mean")


def test_the_import_is_light():
    code = (
        "import sys, subspace_peft;"
        "print(*{'torch', 'peft', 'transformers', 'numpy', 'safetensors', 'difflib'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
