"""Reading a fleet's bytes as few times as memory allows: one pass to check and hash, one to build, whatever the number
of adapters."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from ..basis.module import FLOAT_DTYPES
from ..errors import SourceError
from ..sources.source import Source
from .duplicates import PROBES, half_sketch

DTYPES = {name: dtype for dtype, name in FLOAT_DTYPES.items()}
HALF = (torch.float16, torch.bfloat16)
BLOCK = 1 << 22  # bytes read at a time where they are only hashed
ALIGNED = 64  # bytes; a tensor's memory has to begin at a multiple of its dtype's size


@dataclass(frozen=True)
class Span:
    """Where a tensor lies in a safetensors file: bytes ``start … stop``; `dtype` is None where it is none of ours."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int
    stop: int


def layout(file: Path) -> dict[str, Span]:
    """Tensor name → where it lies, from a safetensors file's header.

    Files of equal headers, as those of a fleet are, share one mapping: do not change it.
    """
    with open(file, "rb") as stream:
        return _header(stream.read(int.from_bytes(stream.read(8), "little")))


@functools.lru_cache(maxsize=256)
def _header(text: bytes) -> dict[str, Span]:
    begin = 8 + len(text)
    entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
    return {
        name: Span(
            DTYPES.get(entry["dtype"]), tuple(entry["shape"]), *(begin + offset for offset in entry["data_offsets"])
        )
        for name, entry in entries.items()
    }


def scan(source: Source) -> torch.Tensor:
    """Check a source's tensors and note its norms and, of a file, the sha256: every byte is read once, a tensor at a
    time.

    Norms are those of ``Source.norm``: from r × r Gram matrices in float64, of half-precision files in float32, whose
    rounding lies far below that of such files.

    Returns:
        What `sketch` gives of every module, (modules, probes) in the order of ``source.keys``, float32.

    Raises:
        SourceError: a tensor's dtype, shape or numbers are unfit, or its rank is not the config's; names it.
    """
    owners = {key: side for sides in source.keys.values() for side, key in sides.items()}
    grams: dict[str, torch.Tensor] = {}
    halves: dict[str, torch.Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for key, value in _tensors(source, owners):
        source.check(key, value)
        flat = value.detach().to("cpu").flatten(1)
        shapes[key] = tuple(flat.shape)
        flat = flat if owners[key] == "A" else flat.T
        grams[key] = gram(flat)
        if not torch.isfinite(grams[key]).all() and not torch.isfinite(value).all():
            raise source.not_finite(key)
        halves[key] = half_sketch(flat, owners[key])
    sketches = torch.empty(len(source.keys), PROBES)
    for number, (module, sides) in enumerate(source.keys.items()):
        B, A = sides["B"], sides["A"]
        source.check_pair(module, shapes[B], shapes[A])
        scale = source.scale(module, shapes[A][0])
        square = (grams[B] * grams[A]).sum().clamp_min(0)
        source.norms[module] = float(square.sqrt()) * abs(scale)
        sketches[number] = scale * (halves[B] * halves[A]).sum(0)
    return sketches


def gram(rows: torch.Tensor) -> torch.Tensor:
    """``X Xᵀ`` (…, r, r) in float64 of X (…, r, d), computed in float32 where X is of half precision and that does not
    overflow."""
    if rows.dtype in HALF:
        wide = rows.float()
        found = (wide @ wide.mT).double()
        if torch.isfinite(found).all():
            return found
    wide = rows.double()
    return wide @ wide.mT


def _tensors(source: Source, wanted: dict[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The wanted tensors, of a file in the order of its bytes; a tensor's memory is the next one's too."""
    if not source.in_file or source.file is None:
        for key in wanted:
            yield key, source.read(key)
        return
    digest = hashlib.sha256()
    memory = torch.empty(0, dtype=torch.uint8)
    source.spans = layout(source.file)
    spans = sorted(source.spans.items(), key=lambda item: item[1].start)
    with open(source.file, "rb", buffering=0) as stream:
        at = 0
        for key, span in spans:
            if key not in wanted:
                continue
            if span.dtype is None:
                yield key, source.read(key)
                continue
            _hash(stream, digest, span.start - at)
            size = span.stop - span.start
            if memory.numel() < size:
                memory = torch.empty(size, dtype=torch.uint8)
            _fill(source, stream, memory[:size], span.start)
            digest.update(memory[:size].numpy())
            at = span.stop
            yield key, memory[:size].view(span.dtype).view(span.shape)
        state = os.fstat(stream.fileno())
        _hash(stream, digest, state.st_size - at)
    source.digest, source.stamp = digest.hexdigest(), (state.st_size, state.st_mtime_ns)


def _hash(stream: BinaryIO, digest: hashlib._Hash, count: int) -> None:
    while count > 0 and (block := stream.read(min(count, BLOCK))):
        digest.update(block)
        count -= len(block)


def _fill(source: Source, stream: BinaryIO, memory: torch.Tensor, start: int) -> None:
    view, done = memoryview(memory.numpy()), 0
    stream.seek(start)
    while done < len(view):
        count = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise SourceError(
                f"{source.location}: {source.file} ended before its header said. It was changed meanwhile."
            )
        done += count


class Reader:
    """The factors of a fleet's modules, for whole groups of modules at a time, each file's bytes in one go.

    Args:
        sources: the fleet, scanned.
        held: at most so many bytes are held for a group of modules.
    """

    def __init__(self, sources: Sequence[Source], held: int) -> None:
        self.sources = sources
        self.most = held
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._held: dict[tuple[int, str], torch.Tensor] = {}

    def groups(self, modules: Sequence[str]) -> Iterator[list[str]]:
        """The modules in their order, as many at a time as can be held; one that is too large by itself is alone and
        not held."""
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
        """Bytes of all sources' factors of one module that come from files, as they are stored."""
        return sum(
            -(-(span.stop - span.start) // ALIGNED) * ALIGNED
            for source in self.sources
            if source.spans is not None and module in source.keys
            for span in (source.spans[key] for key in source.keys[module].values())
        )

    def hold(self, group: Sequence[str]) -> None:
        """Read all that belongs to these modules, if it fits, instead of what is held now."""
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
                    size = span.stop - span.start
                    _fill(source, stream, self._memory[at : at + size], span.start)
                    self._held[number, key] = self._memory[at : at + size].view(span.dtype).view(span.shape).flatten(1)
                    at += -(-size // ALIGNED) * ALIGNED

    def pair(self, number: int, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The stored ``lora_B`` (out, r) and ``lora_A`` (r, in) of source `number`, in their own dtype, without scale.

        They may share memory with what is held: valid until the next `hold`.

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
                    memory = torch.empty(span.stop - span.start, dtype=torch.uint8)
                    _fill(source, stream, memory, span.start)
                    pair.append(memory.view(span.dtype).view(span.shape).flatten(1))
            return pair[0], pair[1]
        return self._held[number, keys[0]], self._held[number, keys[1]]


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[BinaryIO]:
    """The source's file, open for reading; an error where it is not the one that was scanned."""
    with open(source.file, "rb", buffering=0) as stream:  # type: ignore[arg-type]
        state = os.fstat(stream.fileno())
        if source.stamp != (state.st_size, state.st_mtime_ns):
            raise SourceError(
                f"{source.location}: {source.file} was changed while the basis was being built. Build it again."
            )
        yield stream  # type: ignore[misc]
