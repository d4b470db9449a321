"""What a fleet's owner can do before training: each choice trains one task as it says, and leaves a LoRA folder.

Every one has the budget of the fleet's sources and a rate of its own, chosen by validation over all tasks.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from offline.models import put
from peft import LoraConfig, PeftModel, get_peft_model

from subspace_peft import SubspaceBasis, build_basis, export_lora

from .. import tasks
from ..fleet import HEAD, SOURCE_BUDGET, SOURCE_RATE, TARGETS
from ..rows import inside
from ..tasks import EncodedTask
from ..training import make_model, score, train

LORA_RATES = (SOURCE_RATE / 3, SOURCE_RATE, 3 * SOURCE_RATE)
FROZEN_RATES = (2e-3, 6e-3, 1.8e-2)
CORE_RATES = (1.6e-3, 4.8e-3, 1.44e-2)
SWEPT_WITH, SEEDS = 0, (1, 2, 3)
FIRST = 4  # tasks whose LoRAs make the basis of all


@dataclass(frozen=True)
class Choice:
    """One way to train every task of a fleet.

    Attributes:
        name: as the tables print it.
        rates: learning rates that are tried.
        start: of LoRAs: ``own``, ``shared`` (the same A at the start) or ``frozen`` (the same A throughout); "" where
            a core is trained.
        basis: of cores: ``random``, ``base-weights`` or ``first``, of the LoRAs of the fleet's first tasks.
        k: directions of the basis.
    """

    name: str
    rates: tuple[float, ...]
    start: str = ""
    basis: str = ""
    k: int = 0

    @property
    def slug(self) -> str:
        return "-".join(filter(None, (self.start, self.basis, f"k{self.k}" if self.k else "")))

    @property
    def swept_as(self) -> str:
        """The slug of the choice whose sweep gives the rate: cores of all sizes have that of 16."""
        return self.slug if self.start else f"{self.basis}-k16"

    @property
    def generated(self) -> bool:
        """Whether what is frozen is made again from a seed or from the base model."""
        return self.basis in ("random", "base-weights")


CHOICES = (
    Choice("own random starts", LORA_RATES, "own"),
    Choice("one shared start", LORA_RATES, "shared"),
    Choice("one frozen A", FROZEN_RATES, "frozen"),
    *(Choice(f"one random basis, k={k}", CORE_RATES, basis="random", k=k) for k in (16, 8, 32)),
    Choice("one basis of the base weights, k=16", CORE_RATES, basis="base-weights", k=16),
    *(Choice(f"one basis of the first {FIRST} tasks, k={k}", CORE_RATES, basis="first", k=k) for k in (16, 32)),
)

# for a larger fleet: one of each kind
MAIN_CHOICES = tuple(
    choice for choice in CHOICES if choice.start or (choice.k == 16 and choice.basis != "base-weights")
)


def trained(
    choice: Choice, name: str, fleet: Sequence[str], seed: int, rate: float, folder: Path
) -> tuple[Path, float]:
    """Return the LoRA folder of task `name` and its validation score, trained now if it is not there.

    A seed draws the order of the examples, the head, the start and a random basis.

    Args:
        choice: how to train.
        name: of the task.
        fleet: all tasks, in order; the first ones' LoRAs make the basis of ``first``.
        seed: of the training.
        rate: of the adapter.
        folder: the benchmark's cache.
    """
    shown = f"{choice.slug}-{rate:g}-{seed}"
    shown += f"-{hashlib.sha256(','.join(fleet).encode()).hexdigest()[:6]}" if choice.basis == "first" else ""
    home = folder / "choices" / shown / name
    if not home.is_dir():
        task = tasks.load(name, folder)
        top = tasks.top_layers(tasks.kind_of(name), folder)
        wrapped = _wrapped(choice, make_model(top, task.outputs, seed), task, fleet, seed, folder)
        train(wrapped, task, SOURCE_BUDGET, rate, 100 + seed, curve=False)
        reached = score(wrapped, task, "validation")
        aside = home.with_name(f".{home.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        if choice.start:
            wrapped.save_pretrained(aside)
        else:
            export_lora(wrapped, aside)
        (aside / "validation.txt").write_text(f"{reached!r}\n")
        put(aside, home)
        print(f"{shown} {name}: validation {reached:.3f}", flush=True)
    return home, float((home / "validation.txt").read_text())


def _wrapped(
    choice: Choice, model: torch.nn.Module, task: EncodedTask, fleet: Sequence[str], seed: int, folder: Path
) -> PeftModel:
    if not choice.start:
        basis = basis_of(choice, fleet, seed, folder)
        adapter = inside(choice.name, basis).adapter
        assert adapter is not None
        return get_peft_model(model, adapter())
    own = int(hashlib.sha256(task.name.encode()).hexdigest()[:8], 16)
    # behind the model, whose head draws as many numbers as the task has classes: else tasks of another number of
    # classes would start elsewhere
    torch.manual_seed(own + seed if choice.start == "own" else seed)
    wrapped = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, modules_to_save=HEAD))
    if choice.start == "frozen":
        for name, parameter in wrapped.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
    return wrapped


def basis_of(choice: Choice, fleet: Sequence[str], seed: int, folder: Path) -> SubspaceBasis:
    """Return the basis in which all tasks of a choice are trained; a random one is drawn by the seed."""
    return _basis(choice, tuple(fleet), seed, folder)


@cache
def _basis(choice: Choice, fleet: tuple[str, ...], seed: int, folder: Path) -> SubspaceBasis:
    if choice.basis == "first":
        own = Choice("", LORA_RATES, "own")
        # of a seed that no row is reported with
        first = [str(trained(own, name, fleet, SWEPT_WITH, SOURCE_RATE, folder)[0]) for name in fleet[:FIRST]]
        return build_basis(first, k=choice.k, leave_one_out=False, keep_cores=False, progress=False)
    model = make_model(tasks.top_layers(tasks.kind_of(fleet[0]), folder), 2, 0)
    return build_basis(
        builder=choice.basis, base_model=model, target_modules=TARGETS, k=choice.k, seed=seed, progress=False
    )


def sweep(choice: Choice, fleet: Sequence[str], folder: Path) -> dict[float, float]:
    """Return rate → the mean validation score of all tasks."""
    return {
        rate: sum(trained(choice, name, fleet, SWEPT_WITH, rate, folder)[1] for name in fleet) / len(fleet)
        for rate in choice.rates
    }
