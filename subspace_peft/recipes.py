"""The recipes that come with the package: list them, run one, copy one out to edit.

Recipes are scripts, no part of the library: this module finds them by their folder. They share the packages `common`
and `offline` beside them, which a copied recipe takes along.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from ._io.atomic import write_all_aside
from .errors import SubspaceError


def recipe_folder() -> Path:
    """Return the folder of the recipes: inside an installed package, or beside it in a checkout."""
    installed = Path(__file__).parent / "_recipes"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "recipes"


def list_recipes() -> dict[str, str]:
    """Return name → first line of its docstring, of every recipe."""
    found = {}
    for file in sorted(recipe_folder().glob("*.py")):
        words = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        found[file.stem] = words.partition("\n")[0]
    return found


def load_recipe(name: str) -> ModuleType:
    """Import a recipe, or a package that recipes share, by its top-level name.

    The folder of the recipes is put on `sys.path`, as it is where one of them runs as a script.

    Args:
        name: such as ``demo``, ``common`` or ``common.metrics``.

    Raises:
        SubspaceError: another module has that name; a library that the recipe needs is not installed.
    """
    folder = recipe_folder()
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or (folder / error.name.partition(".")[0]).exists():
            raise
        extra = "demo" if name == "demo" else "recipes"
        raise SubspaceError(
            f'The recipes\' {name} needs {error.name}, which is not installed: pip install "subspace-peft[{extra}]".'
        ) from error
    file = getattr(module, "__file__", None)
    if file is None or not Path(file).resolve().is_relative_to(folder.resolve()):
        raise SubspaceError(
            f"The recipes' module {name} is hidden by {file}, which has the same name. Import it in a process of its"
            " own, where the other one is not imported."
        )
    return module


def recipe_files(name: str) -> list[Path]:
    """Return the files that a recipe needs to run: its own first, then the modules beside it that it imports.

    Args:
        name: with or without ``.py``.

    Returns:
        Paths relative to `recipe_folder`.

    Raises:
        SubspaceError: there is no such recipe.
    """
    known, stem, folder = list_recipes(), name.removesuffix(".py"), recipe_folder()
    if stem not in known:
        raise SubspaceError(f"There is no recipe {name!r}; there are {', '.join(known) or 'none'}.")
    files, packages = [folder / f"{stem}.py"], set[str]()
    for file in files:  # grows while it is read
        for package in sorted(_imports(file) - packages):
            if (folder / package).is_dir():
                packages.add(package)
                files += sorted((folder / package).rglob("*.py"))
    return [file.relative_to(folder) for file in files]


def _imports(file: Path) -> set[str]:
    """Return the top-level names that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.partition(".")[0])
    return found


def copy_recipe(name: str, out: str | Path = ".", *, force: bool = False) -> Path:
    """Copy a recipe, and beside it what it imports, so that the copy runs as it stands.

    All files are written, or none. Those that are there already with the same content stay as they are, so that
    several recipes can be copied into one folder.

    Args:
        name: of the recipe, with or without ``.py``.
        out: the file that the recipe becomes, or the folder into which it is copied.
        force: overwrite files that are in the way.

    Returns:
        The recipe's file.

    Raises:
        SubspaceError: there is no such recipe, or files are in the way and `force` is not given.
    """
    own, *beside = recipe_files(name)
    target = Path(out)
    if target.is_dir() or target.suffix != ".py":
        target = target / own
    sources = {target: recipe_folder() / own, **{target.parent / file: recipe_folder() / file for file in beside}}
    contents = {file: source.read_bytes() for file, source in sources.items()}
    changed = {file: content for file, content in contents.items() if not _holds(file, content)}
    if (there := [str(file) for file in changed if file.exists()]) and not force:
        raise SubspaceError(
            f"{', '.join(there)}: exists already, with other content. Remove it, give another place with --out, or"
            " overwrite it with --force."
        )
    write_all_aside({file: _writer(content) for file, content in changed.items()})
    return target


def _holds(file: Path, content: bytes) -> bool:
    return file.is_file() and file.read_bytes() == content


def _writer(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)
