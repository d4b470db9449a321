"""The recipes that come with the package: list them, run one, copy one out to edit.

Recipes are scripts, no part of the library: this module finds them by their folder. They share the packages `common`
and `offline` beside them, which a copied recipe takes along.
"""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import CodeType, ModuleType

from ._io.atomic import write_all_aside
from .errors import SubspaceError

PACKAGE = __name__.rpartition(".")[0]
#: The package, of no file, under which `load_recipe` imports recipes.
MODULES = f"{PACKAGE}.recipe_modules"


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

    It is imported as a module of this package, ``subspace_peft.recipe_modules.<name>``, and so are the modules beside
    it that it imports: neither `sys.path` nor modules of the same names, such as a `common` of yours, play a part.

    Args:
        name: such as ``demo``, ``common`` or ``common.metrics``.

    Raises:
        SubspaceError: a library that the recipe needs is not installed.
    """
    try:
        return importlib.import_module(f"{MODULES}.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == PACKAGE:
            raise
        extra = "demo" if name == "demo" else "recipes"
        raise SubspaceError(
            f'The recipes\' {name} needs {error.name}, which is not installed: pip install "subspace-peft[{extra}]".'
        ) from error


def module_spec(fullname: str) -> importlib.machinery.ModuleSpec | None:
    """Return how a recipe's module is imported as ``<MODULES>.<name>``; None where there is no such recipe."""
    if fullname == MODULES:
        return importlib.machinery.ModuleSpec(fullname, None, is_package=True)
    place = recipe_folder().joinpath(*fullname.removeprefix(f"{MODULES}.").split("."))
    is_package = (place / "__init__.py").is_file()
    file = place / "__init__.py" if is_package else place.with_suffix(".py")
    if not file.is_file():
        return None
    spec = importlib.util.spec_from_file_location(fullname, file, loader=_Loader(fullname, str(file)))
    # a folder named here would let Python's own finder, which is asked first, import the modules inside as they are
    if spec is not None and is_package:
        spec.submodule_search_locations = []
    return spec


class _Loader(importlib.machinery.SourceFileLoader):
    """Import a recipe's file; what it imports from beside it, as ``common``, is found beside it under `MODULES`."""

    def get_code(self, fullname: str) -> CodeType:
        # neither reads nor writes compiled files: those belong to the script, whose imports stay as written
        tree = _Inside().visit(ast.parse(self.get_data(self.path), self.path))
        return self.source_to_code(ast.fix_missing_locations(tree), self.path)  # type: ignore[arg-type]


class _Inside(ast.NodeTransformer):
    """Let imports of the recipes' own modules name them under `MODULES`."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        if not node.level and node.module and _is_own(node.module):
            node.module = f"{MODULES}.{node.module}"
        return node

    def visit_Import(self, node: ast.Import) -> list[ast.AST]:
        found: list[ast.AST] = []
        for alias in node.names:
            if not _is_own(alias.name):
                found.append(ast.Import([alias]))
                continue
            found.append(ast.Import([ast.alias(f"{MODULES}.{alias.name}", alias.asname)]))
            if alias.asname is None:
                # as in any module, `import common.task` makes `common` known
                found.append(ast.ImportFrom(MODULES, [ast.alias(alias.name.partition(".")[0])], 0))
        return [ast.copy_location(each, node) for each in found]


def _is_own(module: str) -> bool:
    place = recipe_folder() / module.partition(".")[0]
    return (place / "__init__.py").is_file() or place.with_suffix(".py").is_file()


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
            f"{', '.join(there)}: exists already, with other content. Remove it, give another place, or overwrite it"
            " with force=True (--force)."
        )
    write_all_aside({file: _writer(content) for file, content in changed.items()})
    return target


def _holds(file: Path, content: bytes) -> bool:
    return file.is_file() and file.read_bytes() == content


def _writer(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)
