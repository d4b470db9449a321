"""A pipeline's task: a folder with a task's folder per part, ``unet``, ``text_encoder`` and the like."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..basis.pipeline_parts import PARTS
from ..errors import SubspaceError
from ..tuner.config import SubspaceConfig
from ..tuner.renaming import new_names
from ..tuner.targets import outer_modules, sizes, supported

CONFIG_FILE = "adapter_config.json"
Sizes = Mapping[str, Mapping[str, int]]


def parts_of_folder(folder: Any) -> list[str]:
    """Return the parts of the pipeline's task that a folder is; none where it is one task, or no folder."""
    if not isinstance(folder, (str, Path)):
        return []
    path = Path(folder)
    try:
        if not path.is_dir() or (path / CONFIG_FILE).is_file():
            return []
        return [part for part in PARTS if (path / part / CONFIG_FILE).is_file()]
    except (OSError, ValueError):
        # a Hub id, or a name that no folder can have
        return []


def check_one_task(folder: Any) -> None:
    """Raise `SubspaceError` where a folder is a pipeline's task, with the folders of its parts."""
    if parts := parts_of_folder(folder):
        raise SubspaceError(
            f"{folder}: it is a pipeline's task, with a folder per part. Name one of them:"
            f" {', '.join(str(Path(folder, part)) for part in parts)}."
        )


def part_for(model: nn.Module, task: Any, parts: Mapping[str, Sizes], remedy: str) -> str:
    """Return the one part that fits a model, by names and shapes of its modules.

    Args:
        model: the model.
        task: named in errors.
        parts: part → the basis's sizes of its modules.
        remedy: how to name a part.

    Raises:
        SubspaceError: none fits, or several; names the parts.
    """
    known = {name: sizes(module) for name, module in outer_modules(model) if supported(module)}
    fits = [part for part, modules in parts.items() if _fits(modules, known)]
    if len(fits) == 1:
        return fits[0]
    what = f"{' and '.join(fits)} fit" if fits else "none of them fits"
    raise SubspaceError(
        f"{task}: it is a pipeline's task, of {', '.join(parts)}, and {what} this {type(model).__name__}. {remedy}"
    )


def part_of_folder_for(model: nn.Module, folder: str | Path, parts: Iterable[str], basis: Any = None) -> str:
    """Return the part in a pipeline's task folder that fits a model. Errors are those of `part_for`."""
    found: dict[str, Sizes] = {}
    given = {} if basis is None else {"basis": basis}
    for part in parts:
        config = SubspaceConfig.from_pretrained(str(folder), subfolder=part, **given)
        if isinstance(config, SubspaceConfig) and config.loaded_from is not None:
            found[part] = config.loaded_from.modules or {}
    return part_for(
        model, folder, found, f"Name one, subfolder={next(iter(parts))!r}, or load the model that it is of."
    )


def _fits(modules: Sizes, known: Mapping[str, tuple[int, int]]) -> bool:
    hits = new_names(modules, known)
    return bool(modules) and all(
        any(known[hit] == (shape["out"], shape["in"]) for hit in hits[name]) for name, shape in modules.items()
    )
