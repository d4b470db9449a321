"""The fleet: one LoRA r=8 per instruction task, each from its own start; bases that leave the held-out one out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from offline.models import put
from peft import LoraConfig, get_peft_model

from subspace_peft import SubspaceBasis, build_basis

from ..fleet import others, require_left_out
from ..training import Budget
from .encoded import EncodedTask
from .prompts import ORDER
from .setting import ADAPTED, SOURCE_BUDGET, SOURCE_RATE, spent
from .training import train


@dataclass
class Fleet:
    """The source adapters on one choice of modules, and the bases built from them.

    Attributes:
        folder: where the adapters are kept.
        targets: ``qv`` or ``linear``, see `setting.ADAPTED`.
        task: gives a task by name.
        top: makes the top layers, frozen.
        names: of the fleet's tasks.
        budget: of each one's training.
    """

    folder: Path
    targets: str
    task: Callable[[str], EncodedTask]
    top: Callable[[], Any]
    names: Sequence[str] = ORDER
    budget: Budget = SOURCE_BUDGET
    _bases: dict[Any, SubspaceBasis] = field(default_factory=dict)

    @property
    def modules(self) -> list[str]:
        return list(ADAPTED[self.targets])

    def source(self, name: str) -> Path:
        """Return the folder of a task's LoRA r=8, trained now if it is not there."""
        home = self.folder / "sources" / f"{self.targets}-{self.budget.examples}-{self.budget.steps}" / name
        if home.is_dir():
            return home
        task = self.task(name)
        # a name's hash is another number for every task, whatever their order
        torch.manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
        wrapped = get_peft_model(self.top(), LoraConfig(r=8, lora_alpha=16, target_modules=self.modules))
        found = train(wrapped, task, self.budget, SOURCE_RATE, 100)
        print(f"source {name} ({self.targets}): {-found['validation']:.3f} nats, {found['seconds']:.0f} s", flush=True)
        aside = home.with_name(f".{name}.partial")
        wrapped.save_pretrained(aside)
        put(aside, home)
        return home

    def facts(self, held_out: str) -> dict[str, Any]:
        """Return what decides the adapters that a held-out task's basis is built from."""
        return {
            "fleet": others(held_out, self.names),
            "budget": spent(self.budget),
            "rate": SOURCE_RATE,
            "r": 8,
            "start": "own",
        }

    def basis(self, held_out: str, k: int) -> SubspaceBasis:
        """Return the basis of all other tasks' adapters.

        Raises:
            SubspaceError: the held-out task's own adapter got into it.
        """
        key = (held_out, k)
        if key not in self._bases:
            folders = [str(self.source(name)) for name in others(held_out, self.names)]
            built = build_basis(folders, k=k, leave_one_out=False, progress=False)
            # those of one held-out task at a time
            self._bases = {known: basis for known, basis in self._bases.items() if known[0] == held_out}
            self._bases[key] = require_left_out(built, self.source(held_out))
        return self._bases[key]

    def control(self, builder: str, k: int, draw: int = 0) -> SubspaceBasis:
        """Return a ``random`` basis, the draw of that number, or that of the ``base-weights``."""
        return build_basis(
            builder=builder, base_model=self.top(), target_modules=self.modules, k=k, seed=draw, progress=False
        )
