"""What a stage for a GPU machine is, and the sizes at which it runs: the real ones, or toy ones on a processor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Cell = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """How the stages run.

    Attributes:
        toy: at toy sizes on the processor, with stand-ins made on the spot for what the Hub has.
        folder: where recipes and builds write; what is in it lets an interrupted stage go on.
        device: what the speed and memory of the stages without a Hub are measured on.
        roberta, vit, mistral: base models, Hub ids or folders.
        glue, images, instructions: held-out tasks.
        adapters: published adapters of `mistral`, Hub ids or folders.
        bf16: whether the recipes compute in bfloat16.
    """

    toy: bool
    folder: Path
    device: str
    roberta: str
    vit: str
    mistral: str
    glue: tuple[str, ...]
    images: tuple[str, ...]
    instructions: tuple[str, ...]
    adapters: tuple[str, ...]
    bf16: bool = True

    def settings(self) -> dict[str, Any]:
        """Return what decides results beside a stage's own sizes; where things lie does not."""
        return {"toy": self.toy, "device": self.device, "bf16": self.bf16}


@dataclass(frozen=True)
class Stage:
    """Some measurements that are taken together.

    Attributes:
        name: by which `--stage` asks for it.
        about: one line.
        minutes: an estimate for one large GPU, downloads left out; the first run will tell.
        cells: name → a measurement, which returns what JSON holds. Each is kept as soon as it is taken.
        settings: what decides the measurements: with another value of it they are others.
        hub: whether it needs the Hub: models, data or published adapters.
    """

    name: str
    about: str
    minutes: float
    cells: Mapping[str, Cell]
    settings: Mapping[str, Any]
    hub: bool = False


def precisions() -> dict[str, torch.dtype]:
    """Return the precisions in which a base model is measured, by name."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}
