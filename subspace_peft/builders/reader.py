"""The second pass over a fleet's files: the factors of as many modules at a time as memory allows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import torch

from ..errors import SourceError
from ..sources.source import Source
from ..sources.spans import fill

ALIGNED = 64  # bytes; a tensor's memory has to begin at a multiple of its dtype's size


class Reader:
    """Read the factors of a fleet's modules, a group of modules at a time, each file's bytes in one go.

    Args:
        sources: the fleet, scanned.
        held: the most bytes that are held for a group of modules.
    """

    def __init__(self, sources: Sequence[Source], held: int) -> None:
        self.sources = sources
        self.most = held
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._held: dict[tuple[int, str], torch.Tensor] = {}

    def groups(self, modules: Sequence[str]) -> Iterator[list[str]]:
        """Yield the modules in their order, as many at a time as can be held.

        One that is too large by itself is alone, and not held.
        """
        group: list[str] = []
        filled = 0
        for module in modules:
            size = self.size(module)
            if group and filled + size > self.most:
                yield group
                group, filled = [], 0
            group.append(module)
            filled += size
        if group:
            yield group

    def size(self, module: str) -> int:
        """Return the bytes of all sources' factors of one module that come from files, as they are stored."""
        return sum(
            -(-span.size // ALIGNED) * ALIGNED
            for source in self.sources
            if source.spans is not None and module in source.keys
            for span in (source.spans[key] for key in source.keys[module].values())
        )

    def hold(self, group: Sequence[str]) -> None:
        """Read all factors of these modules, if they fit, in place of those that are held now."""
        self._held.clear()
        total = sum(self.size(module) for module in group)
        if total > self.most:
            self._memory = torch.empty(0, dtype=torch.uint8)
            return
        if self._memory.numel() < total:
            # the old one first: both together would be beyond what may be held
            self._memory = torch.empty(0, dtype=torch.uint8)
            self._memory = torch.empty(total, dtype=torch.uint8)
        at = 0
        for number, source in enumerate(self.sources):
            own = [module for module in group if module in source.keys]
            if source.spans is None or not own:
                continue
            spans = source.spans
            keys = sorted((key for m in own for key in source.keys[m].values()), key=lambda key: spans[key].start)
            with _opened(source) as stream:
                for key in keys:
                    span = spans[key]
                    memory = self._memory[at : at + span.size]
                    if not fill(stream, memory, span.start):
                        raise source.truncated()
                    self._held[number, key] = span.tensor(memory).flatten(1)
                    at += -(-span.size // ALIGNED) * ALIGNED

    def pair(self, number: int, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the stored ``lora_B`` (out, r) and ``lora_A`` (r, in) of source `number`, without scale.

        They are in their own dtype, and may share memory with what is held: valid until the next `hold`.

        Raises:
            SourceError: the file was changed since it was scanned.
        """
        source = self.sources[number]
        keys = [source.keys[module][side] for side in ("B", "A")]
        if source.spans is None:
            B, A = (source.read(key).detach().to("cpu").flatten(1) for key in keys)
            return B, A
        if (number, keys[0]) not in self._held:
            pair = []
            with _opened(source) as stream:
                for key in keys:
                    span = source.spans[key]
                    memory = torch.empty(span.size, dtype=torch.uint8)
                    if not fill(stream, memory, span.start):
                        raise source.truncated()
                    pair.append(span.tensor(memory).flatten(1))
            return pair[0], pair[1]
        return self._held[number, keys[0]], self._held[number, keys[1]]


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[BinaryIO]:
    """Open the source's file for reading.

    Raises:
        SourceError: it is not the file that was scanned.
    """
    with open(source.file, "rb", buffering=0) as stream:  # type: ignore[arg-type]
        state = os.fstat(stream.fileno())
        if source.stamp != (state.st_size, state.st_mtime_ns):
            raise SourceError(
                f"{source.location}: {source.file} was changed while the basis was being built. Build it again."
            )
        yield stream  # type: ignore[misc]
