"""The rows of the table: how each model is made, and which learning rates its sweep tries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peft import LoraConfig, get_peft_model
from torch import nn

from subspace_peft.basis import SubspaceBasis
from subspace_peft.tuner import SubspaceConfig

from .model import MeanPooledClassifier

ADAPTED = ["query", "value"]
ADAPTED_LAYERS = [3, 4, 5]  # the upper half of the encoder


@dataclass(frozen=True, eq=False)
class Row:
    """One method.

    Attributes:
        name: as the table prints it.
        wrap: puts the method's adapter on an encoder with a fresh head.
        rates: learning rates of its sweep, ascending.
    """

    name: str
    wrap: Callable[[MeanPooledClassifier], nn.Module]
    rates: tuple[float, ...]


def lora(model: MeanPooledClassifier) -> nn.Module:
    """Stock LoRA r=8 on query and value of the upper half; PEFT trains and saves the classifier with it."""
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=ADAPTED,
        layers_to_transform=ADAPTED_LAYERS,
        layers_pattern="layer",
        task_type="SEQ_CLS",
    )
    return get_peft_model(model, config)


def head_only(model: MeanPooledClassifier) -> nn.Module:
    """The frozen encoder under a trained classifier."""
    model.bert.requires_grad_(False)
    return model


def in_basis(basis: SubspaceBasis, **config: object) -> Callable[[MeanPooledClassifier], nn.Module]:
    """Coefficients in `basis`."""

    def wrap(model: MeanPooledClassifier) -> nn.Module:
        return get_peft_model(model, SubspaceConfig(basis=basis, task_type="SEQ_CLS", **config))

    return wrap


def rows(basis: SubspaceBasis, random: SubspaceBasis) -> list[Row]:
    """The compared methods: each sweeps its learning rate; ranges as trials on two source tasks suggested."""
    return [
        Row("head only", head_only, (1e-3, 5e-3, 2e-2)),
        Row("mean core only", in_basis(basis, coefficients="none", mean_gain="trainable"), (3e-2, 1e-1, 3e-1)),
        Row("LoRA r=8", lora, (1e-3, 2.5e-3, 6e-3, 1.5e-2)),
        Row("random basis", in_basis(random, save_basis=False), CORE_RATES),
        Row("this basis", in_basis(basis), CORE_RATES),
    ]


CORE_RATES = (3e-4, 1e-3, 4e-3, 1.2e-2)
