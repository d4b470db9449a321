"""Which names an adapter may have: torch and PEFT make them parts of the names of modules and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import SubspaceError
from .row_batch import BASE

TENSORS = ("weight", "bias")


def check_adapter_name(name: Any, configs: Mapping[str, Any]) -> None:
    """Check the name of an adapter that is about to be made.

    Args:
        name: the adapter's name.
        configs: adapter → configuration, of all of the model's adapters and of this one.

    Raises:
        SubspaceError: torch has no module of that name, or PEFT would take it for something else.
    """
    problem = _problem(name)
    if problem is not None:
        raise SubspaceError(f"An adapter cannot be called {name!r}: {problem}. {_remedy(name)}")
    heads = list(dict.fromkeys(getattr(configs[name], "modules_to_save", None) or ()))
    if heads and name in TENSORS:
        raise SubspaceError(
            f"An adapter cannot be called {name!r} where modules are trained whole ({', '.join(heads)}): the tensors"
            f" in them are called so. {_remedy(name)}"
        )
    # PEFT looks for these modules by the ends of all modules' names, those of the adapters' parts among them
    taken = {other: head for other in configs for head in heads if _ends_with(other, head)}
    if name in taken:
        raise SubspaceError(
            f"An adapter that trains {taken[name]!r} whole cannot be called {name!r}: PEFT would take its parts for"
            f" that module. {_remedy(name)}"
        )
    if taken:
        other, head = next(iter(taken.items()))
        raise SubspaceError(
            f"Adapter {name!r} trains {head!r} whole, and the model has an adapter {other!r}, whose parts PEFT would"
            f" take for that module. Load the adapter {other!r} under another name first."
        )


def _problem(name: Any) -> str | None:
    if not isinstance(name, str):
        return f"it is no text, but {type(name).__name__}"
    if not name:
        return "it is empty"
    if "." in name:
        return "torch allows no dot in a module's name"
    if name == BASE:
        return "as a row's task it means the base model"
    if hasattr(nn.ModuleDict(), name):
        return "torch's modules have an attribute of that name"
    return None


def _ends_with(name: str, head: str) -> bool:
    return f"subspace_coef.{name}".endswith(head)


def _remedy(name: Any) -> str:
    return f"Pass another adapter_name, such as {_proposed(str(name))!r}."


def _proposed(name: str) -> str:
    plain = name.replace(".", "_").strip("_")
    return f"{plain}_task" if plain else "task"
