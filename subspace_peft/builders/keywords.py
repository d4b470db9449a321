"""Options as keywords: a function that takes `BuildOptions` takes each of its fields as a keyword, too."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from typing import Any, TypeVar

from .option_checks import Options

Result = TypeVar("Result")


def takes_options(**kinds: type[Options]) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Let a function that takes options as objects take their fields as keywords, too.

    ``build_basis(sources, k=16)`` and ``build_basis(sources, options=BuildOptions(k=16))`` are then one call; a
    keyword beside an object replaces that field. The function's signature and docstring list the fields, so that
    ``help()`` and editors know them.

    Args:
        kinds: by the parameter's name, the dataclass of options that it takes.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> Result:
            for name, kind in kinds.items():
                own = {key: given.pop(key) for key in kind.names() if key in given}
                whole = given.get(name)
                if whole is not None and not isinstance(whole, kind):
                    raise TypeError(
                        f"{name}={whole!r}: give {kind.__name__}(…), or its fields as keywords of {function.__name__}."
                    )
                given[name] = kind(**own) if whole is None else replace(whole, **own)
            return function(*args, **given)

        call.__signature__ = _signature(function, kinds)  # type: ignore[attr-defined]
        call.__doc__ = _docstring(function, kinds)
        return call

    return decorate


def _signature(function: Callable[..., Any], kinds: dict[str, type[Options]]) -> inspect.Signature:
    signature = inspect.signature(function)
    own = [
        each.replace(default=None, annotation=f"{kinds[each.name].__name__} | None") if each.name in kinds else each
        for each in signature.parameters.values()
    ]
    keyword = inspect.Parameter.KEYWORD_ONLY
    more = [
        inspect.Parameter(
            each.name,
            keyword,
            default=inspect.Parameter.empty if each.default is MISSING else each.default,
            annotation=each.type,
        )
        for kind in kinds.values()
        for each in fields(kind)
    ]
    return signature.replace(parameters=[*own, *more])


def _docstring(function: Callable[..., Any], kinds: dict[str, type[Options]]) -> str | None:
    """Return the function's docstring with the options' attributes at the end of its ``Args``."""
    text = inspect.getdoc(function)
    # python -OO drops all docstrings
    attributes = [inspect.getdoc(kind).partition("\nAttributes:\n")[2] for kind in kinds.values() if kind.__doc__]  # type: ignore[union-attr]
    if not text or not attributes:
        return text
    before, heading, after = text.partition("\n\nArgs:\n")
    arguments, gap, rest = after.partition("\n\n")
    listed = "\n".join([arguments, *(each.rstrip() for each in attributes)])
    return f"{before}{heading}{listed}{gap}{rest}"
