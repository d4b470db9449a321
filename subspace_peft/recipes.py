"""The recipes that come with the package: list them, copy one out to edit."""

from __future__ import annotations

import ast
from pathlib import Path

from ._io.atomic import write_text_aside
from .errors import SubspaceError


def recipe_folder() -> Path:
    """Where the recipes lie: inside an installed package, or beside it in a checkout."""
    installed = Path(__file__).parent / "_recipes"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "recipes"


def list_recipes() -> dict[str, str]:
    """Name → first line of its docstring, of every recipe."""
    found = {}
    for file in sorted(recipe_folder().glob("*.py")):
        words = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        found[file.stem] = words.partition("\n")[0]
    return found


def copy_recipe(name: str, out: str | Path = ".", *, force: bool = False) -> Path:
    """Copy the recipe `name` to the file or into the folder `out`; returns the file.

    Raises:
        SubspaceError: there is no such recipe, or a file is in the way and `force` is not given.
    """
    known = list_recipes()
    stem = name.removesuffix(".py")
    if stem not in known:
        raise SubspaceError(f"There is no recipe {name!r}; there are {', '.join(known) or 'none'}.")
    target = Path(out)
    if target.is_dir() or target.suffix != ".py":
        target = target / f"{stem}.py"
    if target.exists() and not force:
        raise SubspaceError(
            f"{target} exists already. Remove it, give another place with --out, or overwrite it with --force."
        )
    write_text_aside(target, (recipe_folder() / f"{stem}.py").read_text(encoding="utf-8"))
    return target
