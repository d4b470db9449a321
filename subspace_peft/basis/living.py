"""The bases alive in this process, by fingerprint: a second task on the same basis finds it without a path."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

# a `SubspaceBasis` each, whose module imports this one
_alive: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def add(basis: Any) -> None:
    """Let `alive` find a `SubspaceBasis`, unless another object with its fingerprint is there already."""
    _alive.setdefault(basis.fingerprint, basis)


def drop(basis: Any) -> None:
    """Let `alive` no longer find this very object."""
    if _alive.get(basis.fingerprint) is basis:
        del _alive[basis.fingerprint]


def alive(fingerprint: str) -> Any:
    """Return a `SubspaceBasis` with this fingerprint that some part of this process holds, or None."""
    found = _alive.get(fingerprint)
    if found is None or not (wrong := found._altered()):
        return found
    _alive.pop(fingerprint, None)
    warnings.warn(
        f"A basis in this process was changed in place (module {wrong[0]!r}) and no longer is {fingerprint}: it is not"
        " used for tasks that ask for that one. What uses it already computes with the changed values.",
        stacklevel=2,
    )
    return None
