"""Gradients of the adapted layers' weights before anything is trained, and bases made of their directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from subspace_peft import SubspaceBasis
from subspace_peft.basis import ModuleBasis

from .bases import each_module, leading
from .encoder import ADAPTED, Top
from .ridge import ridge, targets
from .tasks import Split
from .training import outputs_of

BATCH = 50

Gradients = Mapping[str, torch.Tensor]


def backward(model: Top, some: Split) -> None:
    """Add the gradient of the mean squared error on `some` to the model's parameters.

    The head is one that ridge regression has fitted: a head drawn at random would give random directions. The model's
    own head is put back.

    Args:
        model: the top layers.
        some: examples with labels.
    """
    kept = {name: value.clone() for name, value in model.classifier.state_dict().items()}
    outputs = model.classifier.out_features
    weight, bias = ridge(outputs_of(model.features, some), some.labels, outputs)
    with torch.no_grad():
        model.classifier.weight.copy_(weight)
        model.classifier.bias.copy_(bias)
    wanted = targets(some.labels, outputs)
    for which in torch.arange(len(some)).split(BATCH):
        part = some.take(which)
        error = (model(part.hidden, part.lengths) - wanted[which]).square().sum()
        (error / wanted.numel()).backward()
    model.classifier.load_state_dict(kept)


def first_gradients(model: Top, some: Split) -> dict[str, torch.Tensor]:
    """Return module → gradient (out, in) of its weight, as `backward` gives it. The model is left as it was."""
    layers = {name: layer for name, layer in model.named_modules() if name.endswith(ADAPTED)}
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    backward(model, some)
    found = {name: layer.weight.grad.detach().clone() for name, layer in layers.items()}
    for name, parameter in model.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(before[name])
    return found


def gradient_basis(like: SubspaceBasis, gradients: Sequence[Gradients]) -> SubspaceBasis:
    """Return the leading left and right singular directions of `gradients`, each of norm 1, together.

    Sizes and sources are those of `like`.
    """

    def change(name: str, module: ModuleBasis) -> ModuleBasis:
        return leading(torch.stack([(g := each[name].double()) / g.norm() for each in gradients]), module)

    return each_module(like, change, f"directions of {len(gradients)} first gradient(s)")
