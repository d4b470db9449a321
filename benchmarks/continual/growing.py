"""Methods whose basis follows the tasks: it grows by what each one lacks, or is re-fitted to all at a fixed size."""

from __future__ import annotations

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from benchmarks.quality.fleet import HEAD
from benchmarks.quality.training import score
from subspace_peft import SubspaceBasis, migrate_task
from subspace_peft.basis.transfer import norm_of_sum
from subspace_peft.builders import plan_refit, refit_basis
from subspace_peft.convert import absorb_task
from subspace_peft.tasks.read import read_task

from .in_basis import CORE_RATES, adapted
from .learner import Learner
from .setting import Data, Stream

WEIGHTS = "adapter_model.safetensors"
Factors = list[tuple[torch.Tensor, torch.Tensor]]  # (B, A), whose products add up to one module's ΔW
MARGIN = 0.01  # by how much of the validation score own directions have to be better: the product's default


class Append(Learner):
    """A core in the basis and `extra` directions of the task's own, by which the basis then grows.

    All that is stored lies in files, written and read by the product's own functions: a version of the basis after
    every task, and a folder per task. Earlier tasks keep their tensors, byte for byte, which is checked.

    Args:
        data, stream, rate: as of every learner.
        extra: φ.
        probe: train the core alone first, and give a task its own directions only if they are better by `MARGIN` on
            the validation split. The core alone is then what forward transfer is measured with.
    """

    from_given = True
    rates = CORE_RATES

    def __init__(self, data: Data, stream: Stream, rate: float, extra: int = 2, probe: bool = False) -> None:
        super().__init__(data, stream, rate)
        self.extra, self.probe = extra, probe
        self._scratch = TemporaryDirectory(prefix="continual-")
        self.folder = Path(self._scratch.name)
        self.learned: list[str] = []
        self.trained: dict[str, dict[str, Factors]] = {}
        self.basis = self.version(data.first_basis(stream.given))

    def version(self, basis: SubspaceBasis) -> SubspaceBasis:
        """Store a version of the basis, and return it as it is read back."""
        place = self.folder / f"basis-{len(self.learned)}-{basis.fingerprint[:8]}"
        basis.save_pretrained(place)
        return SubspaceBasis.from_pretrained(place)

    def task(self, name: str) -> Path:
        """Return the folder of a task."""
        return self.folder / "tasks" / name

    def learn(self, name: str) -> tuple[nn.Module, dict[str, Any]]:
        chosen, facts = self.fitted(name, 0 if self.probe else self.extra)
        if self.probe:
            core, head = chosen, self.heads[name]
            alone = score(core, self.seen(name), "validation")
            forward = {"k": self.k(), "score": score(core, self.seen(name), "test")}
            wider, more = self.fitted(name, self.extra)
            needed = score(wider, self.seen(name), "validation") - alone >= MARGIN
            if needed:
                chosen, facts = wider, more
            else:
                self.heads[name] = head
            facts |= {"forward": forward, "own": needed}
        chosen.save_pretrained(self.task(name))
        return chosen, facts

    def fitted(self, name: str, extra: int) -> tuple[nn.Module, dict[str, Any]]:
        """Train a core and `extra` own directions per module."""
        model = adapted(self.untrained(name), self.basis, self.stream.seed, extra_rank=extra)
        return model, self.fit(model, name)

    def k(self) -> int:
        """Return how many directions each side of each module has; they grow alike."""
        (k,) = {size for each in self.basis.shapes().values() for size in (each["k_out"], each["k_in"])}
        return k

    def absorb(self, name: str) -> dict[str, Any]:
        self.learned.append(name)
        if any("extra_U" in key for key in load_file(self.task(name) / WEIGHTS)):
            made, task = absorb_task(str(self.task(name)), self.basis, progress=False)
            grown = self.version(made)
            task.config.basis = grown
            task.save_pretrained(self.task(name), overwrite=True)
            for older in self.learned[:-1]:
                self.kept(older, grown)
            self.basis = grown
        return {"k": self.k()}

    def kept(self, name: str, grown: SubspaceBasis) -> None:
        """Have an earlier task use the grown basis.

        Raises:
            AssertionError: its tensors are not those it had, byte for byte.
        """
        before = digests(self.task(name))
        migrate_task(str(self.task(name)), grown, pad=False).save_pretrained(self.task(name), overwrite=True)
        assert digests(self.task(name)) == before, name

    def model(self, name: str) -> nn.Module:
        return PeftModel.from_pretrained(self.untrained(name), str(self.task(name)))

    def stored(self, name: str) -> tuple[int, int]:
        own = sum(value.numel() for key, value in load_file(self.task(name) / WEIGHTS).items() if HEAD[0] not in key)
        return own, sum(each.U.numel() + each.V.numel() for each in self.basis.values())


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of each tensor of a task's file."""
    return {
        key: hashlib.sha256(value.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for key, value in load_file(folder / WEIGHTS).items()
    }


class Refit(Append):
    """The same, after which the basis is fitted again within its first size, for all tasks that arrived.

    Args:
        data, stream, rate, extra: as of `Append`.
        given: fit it to the given adapters as well, each counting as a task does.
    """

    def __init__(self, data: Data, stream: Stream, rate: float, extra: int = 2, given: bool = False) -> None:
        super().__init__(data, stream, rate, extra)
        self.fits_given = given

    def absorb(self, name: str) -> dict[str, Any]:
        self.trained[name] = updates(self.task(name))
        facts = super().absorb(name)
        tasks: dict[str, Any] = {each: str(self.task(each)) for each in self.learned}
        plan = plan_refit(self.basis, tasks | (self.given() if self.fits_given else {}), self.data.k)
        self.basis = self.version(refit_basis(plan, max_drift=1.0))
        for each in self.learned:
            migrate_task(tasks[each], self.basis, max_drift=1.0).save_pretrained(tasks[each], overwrite=True)
        drift = {each: self.drift(each) for each in self.learned}
        return facts | {"k": self.k(), "drift": drift, "bound": plan.worst[2]}

    def given(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the given adapters' cores, which the basis holds: they count as tasks do."""
        places = {entry["name"]: i for i, entry in enumerate(self.basis.info["sources"])}
        return {
            f"given {name}": {module: each.cores[places[name]] for module, each in self.basis.items()}
            for name in self.stream.given
        }

    def drift(self, name: str) -> float:
        """Return ‖ΔW now − ΔW as trained‖ / ‖ΔW as trained‖ over all modules of a task."""
        before, now = self.trained[name], updates(self.task(name))
        lost = sum(norm_of_sum([*before[module], *((-B, A) for B, A in now[module])]) ** 2 for module in before)
        return (lost / sum(norm_of_sum(each) ** 2 for each in before.values())) ** 0.5


def updates(folder: Path) -> dict[str, Factors]:
    """Return module → factors (B, A) whose products add up to a stored task's ΔW."""
    task = read_task(str(folder))
    found = {name: [(task.modules[name].U.double() @ core, task.modules[name].V)] for name, core in task.cores.items()}
    for name, own in task.own.items():
        found[name].append(own)
    return found
