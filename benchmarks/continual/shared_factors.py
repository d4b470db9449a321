"""Share's rule as a method of the comparison."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from benchmarks.quality.encoder import ADAPTED
from subspace_peft.sources import open_source

from .learner import Learner
from .setting import RANK, Data, Stream
from .share import Learned, Learning, SharedFactors, absorbed, adapted_layers, distance, first_bases, replace_layers

EXTRA = 2  # rank of the temporary update per factor, as in the released code


class Share(Learner):
    """Loadings in two bases per module and a temporary update, after which all is re-fitted to the fixed size."""

    from_given = True
    rates = (1.6e-3, 6.4e-3, 2.56e-2)
    keep: ClassVar[bool] = False

    def __init__(self, data: Data, stream: Stream, rate: float) -> None:
        super().__init__(data, stream, rate)
        sources = {name: open_source(str(data.bench.source(name))) for name in stream.given}
        self.shared: dict[str, SharedFactors] = {}
        for module in next(iter(sources.values())).keys:
            raw = {name: source.raw(module) for name, source in sources.items()}
            self.shared[module] = first_bases({name: (B, A.T) for name, (B, A) in raw.items()}, data.k)
        self.trained: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
        self.learning: dict[str, Learning] = {}

    def learn(self, name: str) -> tuple[nn.Module, dict[str, Any]]:
        model = self.untrained(name).requires_grad_(False)
        model.classifier.requires_grad_(True)
        draw = torch.Generator().manual_seed(self.stream.seed)
        self.learning = {
            module: Learning(layer, self.shared[module], RANK, EXTRA, draw)
            for module, layer in adapted_layers(model, ADAPTED).items()
        }
        replace_layers(model, self.learning)
        return model, self.fit(model, name)

    def absorb(self, name: str) -> dict[str, Any]:
        self.trained[name] = {}
        for module, learning in self.learning.items():
            update = tuple(side.detach().double() for side in learning.update())
            loadings = (learning.left.detach().double(), learning.right.detach().double())
            before = self.shared[module]
            self.trained[name][module] = (before.out @ loadings[0] + update[0], before.inner @ loadings[1] + update[1])
            self.shared[module] = absorbed(before, name, loadings, update, keep=self.keep)
        self.learning = {}
        return {"drift": {task: self.drift(task) for task in self.trained}}

    def drift(self, name: str) -> float:
        """Return ‖ΔW now − ΔW as trained‖ / ‖ΔW as trained‖ over all modules of a task."""
        found = [distance(pair, self.shared[module].factors(name)) for module, pair in self.trained[name].items()]
        lost, whole = (sum(each[i] ** 2 for each in found) ** 0.5 for i in (0, 1))
        return lost / whole

    def model(self, name: str) -> nn.Module:
        model = self.with_head(name)
        layers = adapted_layers(model, ADAPTED)
        return replace_layers(
            model, {module: Learned(layer, self.shared[module].factors(name)) for module, layer in layers.items()}
        )

    def stored(self, name: str) -> tuple[int, int]:
        own = sum(side.numel() for shared in self.shared.values() for side in shared.loadings[name])
        return own, sum(shared.out.numel() + shared.inner.numel() for shared in self.shared.values())


class ShareKeep(Share):
    """The same, with the temporary update projected as well."""

    keep = True
