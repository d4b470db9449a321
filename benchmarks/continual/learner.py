"""What every method is to the comparison, the methods that keep tasks apart, and those with one set of weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import torch
from peft import LoraConfig, OSFConfig, PeftConfig, get_peft_model
from torch import nn

from benchmarks.quality.encoder import Head
from benchmarks.quality.fleet import HEAD, TARGETS
from benchmarks.quality.tasks import EncodedTask
from benchmarks.quality.training import train

from .setting import RANK, Data, Stream

NUMBER = 4  # bytes of a stored parameter, everywhere


class Learner(ABC):
    """A method at work on one stream of tasks.

    Attributes:
        apart: whether no task can touch another: a stream of one task then says all, and nothing is tested twice.
        from_given: whether the given adapters matter.
        rates: of the sweep, ascending.
    """

    apart: ClassVar[bool] = False
    from_given: ClassVar[bool] = False
    rates: ClassVar[tuple[float, ...]]

    def __init__(self, data: Data, stream: Stream, rate: float) -> None:
        self.data, self.stream, self.rate = data, stream, rate
        self.heads: dict[str, dict[str, torch.Tensor]] = {}

    @abstractmethod
    def learn(self, name: str) -> tuple[nn.Module, dict[str, Any]]:
        """Train on a task.

        Returns:
            The model as trained, before anything is stored; and facts: ``trained`` parameters beside the head, and
            what else the method has to tell.
        """

    @abstractmethod
    def absorb(self, name: str) -> dict[str, Any]:
        """Store what was learned. Returns facts, such as each task's ``drift``."""

    @abstractmethod
    def model(self, name: str) -> nn.Module:
        """Return the model that answers for a task that was learned, as it is stored now."""

    @abstractmethod
    def stored(self, name: str) -> tuple[int, int]:
        """Return the parameters that a task takes by itself, without its head, and those that all tasks share."""

    def seen(self, name: str) -> EncodedTask:
        """Return the task as the method's models take it."""
        return self.data.task(name)

    def fit(self, model: nn.Module, name: str) -> dict[str, Any]:
        """Train `model` within the common budget, and keep its head."""
        torch.manual_seed(self.stream.seed)
        found = train(model, unjudged(self.seen(name)), self.data.budget, self.rate, self.stream.seed, curve=False)
        adapter = sum(p.numel() for key, p in model.named_parameters() if p.requires_grad and HEAD[0] not in key)
        self.heads[name] = head_of(model)
        return {"trained": adapter, "seconds": found["seconds"]}

    def untrained(self, name: str) -> nn.Module:
        """Return the top layers with a head at its start, the same for every method."""
        return self.data.model(name, self.stream.seed)

    def with_head(self, name: str) -> nn.Module:
        """Return the untouched top layers with the head that the task has learned."""
        model = self.untrained(name)
        model.classifier.load_state_dict(self.heads[name])
        return model


def unjudged(task: EncodedTask) -> EncodedTask:
    """Return a task with next to no validation split: `train` scores it at the end, and few methods ask."""
    return replace(task, splits={**task.splits, "validation": task.splits["validation"].take(torch.arange(1))})


def head_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of the trained head's weight and bias."""
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad and HEAD[0] in key}
    return {key.rpartition(".")[2]: value.detach().clone() for key, value in trained.items()}


class Apart(Learner):
    """Methods whose tasks share nothing that training changes: the trained models are what is stored."""

    apart = True

    def __init__(self, data: Data, stream: Stream, rate: float) -> None:
        super().__init__(data, stream, rate)
        self.models: dict[str, nn.Module] = {}
        self.trained: dict[str, int] = {}

    @abstractmethod
    def adapted(self, name: str) -> nn.Module:
        """Return the model to train."""

    def learn(self, name: str) -> tuple[nn.Module, dict[str, Any]]:
        model = self.adapted(name)
        facts = self.fit(model, name)
        self.models[name], self.trained[name] = model, facts["trained"]
        return model, facts

    def absorb(self, name: str) -> dict[str, Any]:
        return {}

    def model(self, name: str) -> nn.Module:
        return self.models[name]

    def stored(self, name: str) -> tuple[int, int]:
        return self.trained[name], 0


class HeadOnly(Apart):
    """A linear head on the untouched encoder. Nothing else is trained, so the rate that is swept is the head's."""

    rates = (1e-3, 4e-3, 1.6e-2)

    def adapted(self, name: str) -> nn.Module:
        task = self.seen(name)
        return Head(task.splits["train"].hidden.shape[-1], task.outputs, self.stream.seed)

    def seen(self, name: str) -> EncodedTask:
        return self.data.pooled(name)


class LoraEach(Apart):
    """A LoRA of its own for every task."""

    rates = (4e-4, 1.6e-3, 6.4e-3)

    def adapted(self, name: str) -> nn.Module:
        torch.manual_seed(self.stream.seed)
        return get_peft_model(self.untrained(name), lora_config())


def lora_config() -> LoraConfig:
    """Return the LoRA that every method with one uses, as the given adapters are."""
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, modules_to_save=HEAD)


class OneModel(Learner):
    """Methods with one set of weights for all tasks, which each task trains further; heads are each task's own.

    `state` holds what is shared: the tensors, by name, in which the model differs from the untouched one.
    """

    def __init__(self, data: Data, stream: Stream, rate: float) -> None:
        super().__init__(data, stream, rate)
        self.state: dict[str, torch.Tensor] = {}

    @abstractmethod
    def config(self, name: str) -> PeftConfig:
        """Return the adapter with which a task trains the shared weights further."""

    @abstractmethod
    def keep(self, model: nn.Module) -> None:
        """Take the shared tensors off the trained model."""

    def learn(self, name: str) -> tuple[nn.Module, dict[str, Any]]:
        torch.manual_seed(self.stream.seed)
        model = self.begun(name)
        facts = self.fit(model, name)
        self.keep(model)
        return model, facts

    @abstractmethod
    def begun(self, name: str) -> nn.Module:
        """Return the model to train, where the tasks before have left it."""

    def absorb(self, name: str) -> dict[str, Any]:
        return {}

    def stored(self, name: str) -> tuple[int, int]:
        return 0, sum(value.numel() for value in self.state.values())


class SequentialLora(OneModel):
    """One LoRA that all tasks train, one after another."""

    rates = (4e-4, 1.6e-3, 6.4e-3)

    def config(self, name: str) -> PeftConfig:
        return lora_config()

    def begun(self, name: str) -> nn.Module:
        model = get_peft_model(self.untrained(name), self.config(name))
        self.load(model)
        return model

    def keep(self, model: nn.Module) -> None:
        self.state = {key: p.detach().clone() for key, p in model.named_parameters() if ".lora_" in key}

    def load(self, model: nn.Module) -> None:
        """Give the model the LoRA as it is."""
        own = dict(model.named_parameters())
        with torch.no_grad():
            for key, value in self.state.items():
                own[key].copy_(value)

    def model(self, name: str) -> nn.Module:
        model = get_peft_model(self.with_head(name), self.config(name))
        self.load(model)
        return model


class Osf(OneModel):
    """PEFT's OSF (arXiv 2504.07097), used as its documentation says for a known number of tasks.

    Task i of n preserves the leading (i − 1)/n of each weight's singular directions and trains the rest; between tasks
    the trained part is merged and the decomposition computed again. A preserved rank of 0 is refused: the first task
    has 1.
    """

    rates = (1e-4, 4e-4, 1.6e-3)

    def config(self, name: str) -> PeftConfig:
        place, count = self.stream.arriving.index(name), len(self.stream.arriving)
        model = self.data.model(name, 0)
        width = min(model.get_submodule(f"layer.0.{TARGETS[0]}").weight.shape)
        return OSFConfig(effective_rank=max(1, width * place // count), target_modules=TARGETS, modules_to_save=HEAD)

    def begun(self, name: str) -> nn.Module:
        base = self.untrained(name)
        base.load_state_dict(self.state, strict=False)
        return get_peft_model(base, self.config(name))

    def keep(self, model: nn.Module) -> None:
        # `unload` would drop what was trained: in this version of PEFT it lies beside the weight, not in it
        merged = {}
        for key, layer in model.base_model.model.named_modules():
            if hasattr(layer, "get_delta_weight"):
                weight = layer.get_base_layer().weight.detach()
                merged[f"{key}.weight"] = weight + layer.get_delta_weight("default").detach()
        self.state = merged

    def model(self, name: str) -> nn.Module:
        model = self.with_head(name)
        model.load_state_dict(self.state, strict=False)
        return model
