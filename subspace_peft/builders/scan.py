"""The first of two passes over a fleet's files: check every tensor, hash every byte, measure every update."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import BinaryIO

import torch

from ..sources.factors import gram
from ..sources.source import Source
from ..sources.spans import fill, read_spans
from .duplicates import PROBES, half_sketch

BLOCK = 1 << 22  # bytes read at a time where they are only hashed


def scan(source: Source) -> torch.Tensor:
    """Check a source's tensors and note its norms and, of a file, the sha256.

    Every byte is read once, a tensor at a time. Norms are those of ``Source.norm``: from r × r Gram matrices in
    float64, of half-precision files in float32, whose rounding lies far below that of such files.

    Args:
        source: gets its ``norms``; of a file also ``digest``, ``spans`` and ``stamp``.

    Returns:
        The `sketch` of every module, (modules, probes) in the order of ``source.keys``, float32.

    Raises:
        SourceError: a tensor's dtype, shape or values are unfit, or its rank is not the config's; names it.
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
        # NaN and inf show in the r × r matrix; finite values that overflow there are looked at themselves
        if not torch.isfinite(grams[key]).all() and not torch.isfinite(value).all():
            raise source.not_finite(key)
        halves[key] = half_sketch(flat, owners[key])
    sketches = torch.empty(len(source.keys), PROBES)
    for number, (module, sides) in enumerate(source.keys.items()):
        B, A = sides["B"], sides["A"]
        source.check_pair(module, shapes[B], shapes[A])
        scale = source.scale(module, shapes[A][0])
        # ‖B A‖² = tr(BᵀB A Aᵀ) = Σ BᵀB ∘ A Aᵀ
        square = (grams[B] * grams[A]).sum().clamp_min(0)
        source.norms[module] = float(square.sqrt()) * abs(scale)
        sketches[number] = scale * (halves[B] * halves[A]).sum(0)
    return sketches


def skim(source: Source) -> None:
    """Note where the tensors lie in a source's file, which another process scans."""
    if source.in_file and source.file is not None:
        source.spans = read_spans(source.file)


def _tensors(source: Source, wanted: dict[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the wanted tensors, of a file in the order of its bytes; each one's memory is used again for the next."""
    if not source.in_file or source.file is None:
        for key in wanted:
            yield key, source.read(key)
        return
    digest = hashlib.sha256()
    memory = torch.empty(0, dtype=torch.uint8)
    source.spans = read_spans(source.file)
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
            if memory.numel() < span.size:
                memory = torch.empty(span.size, dtype=torch.uint8)
            if not fill(stream, memory[: span.size], span.start):
                raise source.truncated()
            digest.update(memory[: span.size].numpy())
            at = span.stop
            yield key, span.tensor(memory[: span.size])
        state = os.fstat(stream.fileno())
        _hash(stream, digest, state.st_size - at)
    source.digest, source.stamp = digest.hexdigest(), (state.st_size, state.st_mtime_ns)


def _hash(stream: BinaryIO, digest: hashlib._Hash, count: int) -> None:
    while count > 0 and (block := stream.read(min(count, BLOCK))):
        digest.update(block)
        count -= len(block)
