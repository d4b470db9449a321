"""The start of a core: the nearest source, or a convex mix of all, chosen on a few training examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from peft import get_peft_model
from torch import nn

from subspace_peft import SubspaceBasis, SubspaceConfig
from subspace_peft.basis import ModuleBasis

from .bases import each_module
from .fleet import TARGETS
from .ridge import ridge, targets
from .tasks import Split
from .training import HEAD_RATE, Budget, batches, draw_examples, make_loss, make_model, outputs_of

if TYPE_CHECKING:
    from .bench import Bench

FIT, HELD = 200, 100
MIX_BATCHES = 20
MIX_RATE = 0.3  # of the mix's logits


def nearest_source(bench: Bench, name: str, basis: SubspaceBasis) -> str:
    """Return the name of the source whose projection on `basis` gives the best features.

    Best is what lets a ridge regression, fitted on 200 training examples, predict 100 others.
    """
    task = bench.task(name)
    some = task.splits["train"].take(torch.arange(FIT + HELD))
    losses = {}
    for each in basis.info["sources"]:
        model = get_peft_model(
            make_model(bench.top(name), 1, 0),
            SubspaceConfig(basis=basis, start=each["name"], target_modules=TARGETS, save_basis=True),
        )
        model.base_model.model.classifier = nn.Identity()
        losses[each["name"]] = ridge_loss(outputs_of(model, some), some, task.outputs)
    return min(sorted(losses), key=losses.__getitem__)


def ridge_loss(features: torch.Tensor, some: Split, outputs: int) -> float:
    """Return the mean squared error on the last `HELD` examples of a ridge regression on the others."""
    weight, bias = ridge(features[:FIT], some.labels[:FIT], outputs)
    return float((features[FIT:] @ weight.T + bias - targets(some.labels[FIT:], outputs)).square().mean())


def convex_mix(bench: Bench, name: str, basis: SubspaceBasis, budget: Budget, seed: int) -> torch.Tensor:
    """Return weights (N + 1,), none below 0, their sum 1, of the sources' cores and, last, of no update at all.

    They are what Adam makes of equal ones in 20 batches of the training examples that `seed` draws, together with a
    head that begins at a ridge regression.

    Args:
        basis: one with its sources' cores.
    """
    task = bench.task(name)
    data = task.splits["train"]
    chosen, draw = draw_examples(task, budget, seed)
    model = make_model(bench.top(name), task.outputs, seed).requires_grad_(False)
    weights = {module: model.get_submodule(module).weight for module in basis}
    logits = torch.zeros(len(basis.info["sources"]) + 1, requires_grad=True)
    some = data.take(torch.tensor(chosen))
    loss_of = make_loss(task, some.labels)
    known = (some.labels - some.labels.mean()) / some.labels.std() if task.number else some.labels
    weight, bias = ridge(outputs_of(model.features, some), known, task.outputs)
    head = [value.requires_grad_(True) for value in (weight, bias)]
    optimiser = torch.optim.Adam([{"params": [logits], "lr": MIX_RATE}, {"params": head, "lr": HEAD_RATE}])
    for which in batches(data, chosen, replace(budget, steps=MIX_BATCHES), draw):
        part = data.take(which)
        changed = {
            f"{module}.weight": weights[module] + basis[module].U @ mixed @ basis[module].V
            for module, mixed in mix_cores(basis, logits.softmax(0)).items()
        }
        changed |= {"classifier.weight": head[0], "classifier.bias": head[1]}
        outputs = torch.func.functional_call(model, changed, (part.hidden, part.lengths))
        loss_of(outputs, part.labels).backward()
        optimiser.step()
        optimiser.zero_grad()
    return logits.detach().softmax(0)


def mix_cores(basis: SubspaceBasis, mix: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """Return module → Σᵢ mixᵢ Cᵢ (k_out, k_in) over the sources; the last entry of `mix` (N + 1,) is no update's.

    Raises `ValueError` where the basis has no cores.
    """
    found = {}
    for name, module in basis.items():
        if module.cores is None:
            raise ValueError(f"{name}: the basis has no cores to mix.")
        found[name] = torch.einsum("n,nij->ij", mix[:-1], module.cores)
    return found


def starting_at_mix(basis: SubspaceBasis, mix: torch.Tensor) -> SubspaceBasis:
    """Return `basis` with the mix of its sources' cores in place of their mean: to be used with ``start="mean"``."""
    cores = mix_cores(basis, mix)

    def change(name: str, module: ModuleBasis) -> ModuleBasis:
        return replace(module, M=cores[name].contiguous())

    return each_module(basis, change, "a mix in the place of the mean")
