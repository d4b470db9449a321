"""Keywords of earlier versions, which recipes that were copied out still give."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def takes_old_keyword(old: str, new: str) -> Callable[[Function], Function]:
    """Let a function take the keyword `new` by its old name too, with a FutureWarning."""

    def wrap(function: Function) -> Function:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if old in kwargs and new not in kwargs:
                name = getattr(function, "__name__", "function")
                said = f"{name}: {old}= is called {new}= now; the old name will go."
                warnings.warn(said, FutureWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapped  # type: ignore[return-value]

    return wrap
