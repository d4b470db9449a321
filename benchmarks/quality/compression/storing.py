"""Tensors as a file would hold them, in four kinds of numbers, and a fleet that is stored so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

Tensors = dict[str, torch.Tensor]
Updates = Mapping[str, torch.Tensor]  # module → ΔW (out, in) float32

KINDS = ("float32", "bfloat16", "int8", "int4")
STEPS = {"int8": 127, "int4": 7}
# a scale is rounded to bfloat16, to 2⁻⁹ of itself: made larger before that, it is never too small for its row
ROOM = 1 + 2.0**-7


def store(name: str, rows: torch.Tensor, kind: str) -> Tensors:
    """Return the tensors that hold `rows` (n, d): numbers of one `kind`, for whole ones a scale per row as well.

    A row's entries are rounded to multiples of its scale, a bfloat16: from −127 to 127 for ``int8``, from −7 to 7 for
    ``int4``, two of which share a byte.

    Raises:
        ValueError: there is no such kind; an odd number of entries for ``int4``.
    """
    if kind == "float32":
        return {name: rows.float().contiguous()}
    if kind == "bfloat16":
        return {name: rows.bfloat16().contiguous()}
    if kind not in STEPS:
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(KINDS)}.")
    rows, most = rows.double(), STEPS[kind]
    scale = (rows.abs().amax(1).clamp_min(1e-30) / most * ROOM).bfloat16()
    steps = (rows / scale.double()[:, None]).round().clamp(-most, most).to(torch.int8)
    if kind == "int4":
        if steps.numel() % 2:
            raise ValueError(f"{name} has {tuple(rows.shape)} entries, an odd number, which int4 cannot pair.")
        pairs = (steps.flatten() + 8).to(torch.uint8)
        steps = pairs[0::2] | (pairs[1::2] << 4)
    return {name: steps, f"{name}.scale": scale}


def restore(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return the rows (n, d) float32 that `store` put into `tensors` under `name`."""
    found = tensors[name]
    if f"{name}.scale" not in tensors:
        return found.float()
    scale = tensors[f"{name}.scale"].float()[:, None]
    if found.dtype == torch.uint8:
        found = torch.stack([found & 15, found >> 4], 1).flatten().to(torch.int8) - 8
    return found.reshape(len(scale), -1).float() * scale


def size_of(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the bytes of the tensors, as a safetensors file holds them behind its header."""
    return sum(each.numel() * each.element_size() for each in tensors.values())


class Compressed(Protocol):
    """A fleet that is stored somehow.

    Attributes:
        bytes: of all adapters together with what they share.
        facts: what is worth knowing beside, such as directions per module.
    """

    @property
    def bytes(self) -> int: ...

    @property
    def facts(self) -> Mapping[str, Any]: ...

    def updates(self, name: str) -> Updates:
        """Return the updates of adapter `name`, from what is stored alone."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A fleet as tensors.

    Attributes:
        shared: what all adapters need.
        tasks: adapter → its own tensors.
        read: makes an adapter's updates of both.
        facts: see `Compressed`.
    """

    shared: Tensors
    tasks: dict[str, Tensors]
    read: Callable[[Tensors, Tensors], Updates]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return size_of(self.shared) + sum(map(size_of, self.tasks.values()))

    def updates(self, name: str) -> Updates:
        return self.read(self.shared, self.tasks[name])
