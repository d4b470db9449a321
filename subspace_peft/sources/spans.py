"""The byte ranges of a safetensors file's tensors, so that they can be read into memory that is used again."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from ..basis.module import FLOAT_DTYPES

DTYPES = {name: dtype for dtype, name in FLOAT_DTYPES.items()}


@dataclass(frozen=True)
class Span:
    """The byte range of a tensor in a safetensors file.

    Attributes:
        dtype: None where it is not one of the float dtypes that are supported.
        shape: of the tensor.
        start: its first byte, counted from the beginning of the file.
        stop: the byte after its last.
    """

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return self.stop - self.start

    def tensor(self, memory: torch.Tensor) -> torch.Tensor:
        """View its bytes (uint8) as the tensor."""
        return memory.view(self.dtype).view(self.shape)


def read_spans(file: Path) -> dict[str, Span]:
    """Return tensor name → where it lies, from a safetensors file's header.

    Files of equal headers, as those of a fleet are, share one mapping: do not change it.
    """
    with open(file, "rb") as stream:
        return _spans(stream.read(int.from_bytes(stream.read(8), "little")))


@functools.lru_cache(maxsize=256)
def _spans(header: bytes) -> dict[str, Span]:
    begin = 8 + len(header)
    entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    return {
        name: Span(
            DTYPES.get(entry["dtype"]), tuple(entry["shape"]), *(begin + offset for offset in entry["data_offsets"])
        )
        for name, entry in entries.items()
    }


def fill(stream: BinaryIO, memory: torch.Tensor, start: int) -> bool:
    """Read a file's bytes from `start` on into `memory` (uint8).

    Returns:
        Whether the file had enough of them.
    """
    view, done = memoryview(memory.numpy()), 0
    stream.seek(start)
    while done < len(view):
        count = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            return False
        done += count
    return True
