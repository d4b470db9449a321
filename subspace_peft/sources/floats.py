"""Read floats of eight bits as float32, which holds them exactly."""

from __future__ import annotations

from collections.abc import Callable

import torch

EIGHT_BITS = frozenset(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
)


def upcast(read: Callable[[str], torch.Tensor]) -> Callable[[str], torch.Tensor]:
    """Return a reader of the same tensors that gives float32 for those of eight bits."""

    def wider(key: str) -> torch.Tensor:
        value = read(key)
        return value.float() if value.dtype in EIGHT_BITS else value

    return wider
