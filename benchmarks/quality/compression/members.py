"""A fleet: LoRA folders, and for each a function that tells what it does with given updates. Any fleet can be one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from subspace_peft import SubspaceBasis, build_basis
from subspace_peft.sources import Factors, open_source

from .storing import Updates


@dataclass(frozen=True, eq=False)
class Judged:
    """What an adapter does.

    Attributes:
        validation, test: its scores on either split, in [0, 1].
        loss: on the test split.
        outputs: (n, classes) or (n, 1) for a number, on the test split: held against another's, see `agreement`.
    """

    validation: float
    test: float
    loss: float
    outputs: torch.Tensor


@dataclass(frozen=True, eq=False)
class Member:
    """An adapter of a fleet.

    Attributes:
        name: its own in the fleet.
        folder: of the LoRA as it was trained, as PEFT saves it.
        judge: what it does with these updates ΔW of its modules in the place of its own, under its own trained head;
            with none (an empty mapping) what the base model does under that head.
    """

    name: str
    folder: Path
    judge: Callable[[Updates], Judged]


@dataclass(eq=False)
class Fleet:
    """Adapters of the same modules.

    Attributes:
        members: the adapters.
        given: a basis in which all of them were trained, if they were.
        generated: whether that basis is made again from a seed, so that it takes no bytes.
        frozen_inputs: whether all have the same A.
    """

    members: Sequence[Member]
    given: SubspaceBasis | None = None
    generated: bool = False
    frozen_inputs: bool = False

    def __post_init__(self) -> None:
        self._bases: dict[str, SubspaceBasis] = {}
        self._updates: dict[str, dict[str, Factors]] = {}

    @property
    def names(self) -> list[str]:
        return [member.name for member in self.members]

    @property
    def folders(self) -> list[str]:
        return [str(member.folder) for member in self.members]

    @cached_property
    def digest(self) -> str:
        """The first 16 digits of the sha256 over the adapters' files: fleets trained elsewhere have another one."""
        digests = [
            hashlib.sha256((m.folder / "adapter_model.safetensors").read_bytes()).digest() for m in self.members
        ]
        return hashlib.sha256(b"".join(digests)).hexdigest()[:16]

    def factors(self, name: str) -> dict[str, Factors]:
        """Return the updates of adapter `name` in factored form, by module."""
        if name not in self._updates:
            folder = next(member.folder for member in self.members if member.name == name)
            source = open_source(str(folder))
            self._updates[name] = {module: source.factors(module) for module in source.keys}
        return self._updates[name]

    def basis(self, **build: Any) -> SubspaceBasis:
        """Return a basis of all members' adapters, kept for the next call."""
        key = json.dumps(build, sort_keys=True)
        if key not in self._bases:
            how = {"leave_one_out": False, "keep_cores": False, "progress": False, **build}
            self._bases[key] = build_basis(self.folders, **how)
        return self._bases[key]


def dense(factors: Mapping[str, Factors]) -> dict[str, torch.Tensor]:
    """Return the updates ΔW (out, in) float32, by module."""
    return {module: (each.B @ each.A).float() for module, each in factors.items()}


def kept(original: Updates, found: Updates) -> float:
    """Return the share of energy kept, 1 − ‖ΔW − ΔW'‖² / ‖ΔW‖² over all modules together; 1 where ΔW is zero.

    Of a projection it is what `subspace_peft` calls so. Of rounded weights it can be below 0.
    """
    lost, total = 0.0, 0.0
    for module, update in original.items():
        lost += float((update - found[module]).double().square().sum())
        total += float(update.double().square().sum())
    return 1 - lost / total if total else 1.0


def agreement(whole: Judged, bare: Judged, found: Judged) -> dict[str, float]:
    """Hold an adapter against the LoRA that it was.

    Args:
        whole: the LoRA.
        bare: the base model under the LoRA's head.
        found: what is left of the LoRA.

    Returns:
        - ``same``: the share of test examples whose class is the LoRA's; of numbers the correlation with the LoRA's.
        - ``change``: ‖outputs − LoRA's‖ / ‖base model's − LoRA's‖: 0 for the LoRA, 1 for the base model.
    """
    if whole.outputs.shape[1] > 1:
        same = float((whole.outputs.argmax(1) == found.outputs.argmax(1)).double().mean())
    else:
        both = torch.stack([whole.outputs[:, 0], found.outputs[:, 0]]).double()
        same = float(torch.nan_to_num(torch.corrcoef(both))[0, 1])
    away = float((bare.outputs - whole.outputs).norm())
    return {"same": same, "change": float((found.outputs - whole.outputs).norm()) / away if away else 0.0}
