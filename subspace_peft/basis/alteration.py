"""Find bases whose values were changed in place after their fingerprint was computed, at next to no cost."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch

from .module_store import ModuleStore
from .precision import stored_digest

PROBED = 8  # entries of each tensor that are looked at: a version counter misses what goes through `.data` or NumPy

Mark = tuple[int, int, tuple[float, ...]]


def marks_of(modules: ModuleStore) -> dict[str, tuple[Mark, ...]]:
    """Return marks of all tensors that a store holds in memory; empty for a file, whose tensors are verified anyway.

    A tensor's mark is which tensor it is, PyTorch's count of the writes to it, and some of its entries.
    """
    return {
        name: tuple(_mark(tensor) for tensor in modules.held(name).values()) for name in modules if modules.held(name)
    }


def altered(modules: ModuleStore, marks: dict[str, tuple[Mark, ...]], digests: Mapping[str, str]) -> list[str]:
    """Return the modules whose tensors are no longer those of their digests.

    Only modules with other marks are hashed; those that turn out to be as they were get new marks.

    Args:
        modules: as they are now.
        marks: of `marks_of`, when they had these digests; brought up to date.
        digests: module → sha256 of its tensors as stored.
    """
    wrong = []
    for name, before in marks.items():
        now = tuple(_mark(tensor) for tensor in modules.held(name).values())
        if now == before:
            continue
        if stored_digest(modules.held(name)) == digests[name]:
            marks[name] = now
        else:
            wrong.append(name)
    return wrong


def rehashed(modules: ModuleStore, digests: Mapping[str, str]) -> list[str]:
    """Return the modules in memory whose tensors are no longer those of their digests; all of them are hashed."""
    return [name for name in modules if (held := modules.held(name)) and stored_digest(held) != digests[name]]


def _mark(tensor: torch.Tensor) -> Mark:
    version = 0
    with contextlib.suppress(RuntimeError):  # tensors made in inference mode do not count
        version = tensor._version
    if tensor.device.type == "meta" or not tensor.numel():
        return id(tensor), version, ()
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach()[:1].reshape(-1)
    some = flat[:: max(1, len(flat) // PROBED)]
    return id(tensor), version, tuple(some.float().tolist())
