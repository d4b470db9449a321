"""Choose which modules get directions of a task's own, and how many, by the gradient that its basis cannot follow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from .._adapted import active_adapter, unwrapped
from .._io.untrusted import is_finite
from ..basis.spread import spread_by_energy
from ..errors import SubspaceError
from .layer import SubspaceLayer
from .patterns import exact_pattern

WIDTH = 16  # columns of the sketch from which a module's directions are found; the other side's has 2 · WIDTH + 1


class ExtraRanks(NamedTuple):
    """How many directions of its own a task is to have: two fields of a `SubspaceConfig`.

    Attributes:
        extra_rank: In modules that the pattern does not name.
        extra_rank_pattern: Module → how many it gets instead.
    """

    extra_rank: int
    extra_rank_pattern: dict[str, int]


@dataclass(frozen=True)
class GradientBeside:
    """What of the loss's gradient for a module's ΔW lies outside the basis.

    Attributes:
        squares: (width,) float64, descending: squared singular values of ``G − U Uᵀ G Vᵀ V``. One direction of the
            task's own can follow one of them.
        total: ``‖G‖²`` as far as the sketch holds it: the squares, and what the basis can follow.
        cost: Parameters of one direction, out + in.
    """

    squares: torch.Tensor
    total: float
    cost: int


def choose_extra_ranks(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    budget: int | None = None,
    share: float | None = None,
    most: int = 8,
    loss: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    adapter_name: str | None = None,
    width: int = WIDTH,
    seed: int = 0,
) -> ExtraRanks:
    """Choose `extra_rank` and `extra_rank_pattern` by where the basis cannot follow the loss's gradient.

    A direction of a task's own in a module can follow one singular direction of what the basis leaves of the gradient
    for ΔW, and costs out + in parameters. Directions go to where a parameter gains most of its squared norm, one after
    the other, until the budget is spent or the share is reached.

    Args:
        model: A PeftModel with a task in a basis, untrained or trained. It is left as it is, gradients included.
        batches: Of the training data, a few; their gradients are summed.
        budget: Parameters that all own directions together may have.
        share: Instead, the share of the squared gradient norm outside the basis, in (0, 1], that is to be followed.
        most: Directions per module at most.
        loss: ``loss(model, batch)``, a number; ``model(**batch).loss`` by default.
        adapter_name: The adapter; the active one by default.
        width: See `gradients_beside`.
        seed: Of the sketch.

    Returns:
        Both fields, for ``SubspaceConfig(…, extra_rank=…, extra_rank_pattern=…)``.

    Raises:
        SubspaceError: Neither budget nor share, or both; a budget that buys no direction in any module; no such
            adapter, no batch, or a loss that is no finite number.
    """
    if (budget is None) == (share is None):
        raise SubspaceError("Give budget=, how many parameters, or share=, how much of the gradient; one of the two.")
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 0):
        raise SubspaceError(f"budget={budget!r}: give a whole number of parameters from 0 on.")
    if share is not None and not (is_finite(share) and 0 < share <= 1):
        raise SubspaceError(f"share={share!r}: give a number above 0 and at most 1.")
    if isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= width:
        raise SubspaceError(f"most={most!r}: give a whole number from 1 to {width}, the sketch's width= ({width}).")
    found = gradients_beside(model, batches, loss=loss, adapter_name=adapter_name, width=width, seed=seed)
    costs = [each.cost for each in found.values()]
    if budget and budget < min(costs):
        raise SubspaceError(
            f"budget={budget}: one direction takes {min(costs):,} parameters at least, as many as a module's out + in."
            f" Give {min(costs)} or more; {sum(costs)} are one in every module, 0 is none."
        )
    counts = spread_directions(found, budget=budget, share=share, most=most)
    common = set(counts.values())
    return ExtraRanks(common.pop(), {}) if len(common) == 1 else ExtraRanks(0, exact_pattern(counts, 0))


def spread_directions(
    found: Mapping[str, GradientBeside], *, budget: int | None = None, share: float | None = None, most: int = 8
) -> dict[str, int]:
    """Return module → how many directions of its own it gets; arguments as of `choose_extra_ranks`."""
    energies = {name: each.squares[:most].tolist() for name, each in found.items()}
    costs = {name: each.cost for name, each in found.items()}
    wanted = None if share is None else share * sum(float(each.squares.sum()) for each in found.values()) * (1 - 1e-9)
    return spread_by_energy(energies, costs, budget=budget, wanted=wanted)


def gradients_beside(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    adapter_name: str | None = None,
    width: int = WIDTH,
    seed: int = 0,
) -> dict[str, GradientBeside]:
    """Return for each adapted module what the basis leaves of the loss's gradient for ΔW.

    The gradient ``G = Σ g xᵀ`` (out, in) over all tokens is never formed: kept are ``G Ω`` (out, width), ``Ψᵀ G`` (2 ·
    width + 1, in) and ``Uᵀ G Vᵀ``, with random Ω and Ψ. From the first two, less the basis's part, a low-rank
    approximation follows (single-pass sketch of Tropp et al. 2017, arXiv 1609.00048): exact where it has a rank of
    `width` or less, and close in its leading singular values elsewhere.

    Args:
        model: See `choose_extra_ranks`.
        batches: See there.
        loss: See there.
        adapter_name: See there.
        width: Columns of Ω.
        seed: Of Ω and Ψ.

    Raises:
        SubspaceError: See there.
    """
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise SubspaceError(f"width={width!r}: give a whole number from 1 on.")
    adapter = adapter_name or active_adapter(unwrapped(model))
    layers = {
        layer.key: layer
        for layer in model.modules()
        if isinstance(layer, SubspaceLayer) and adapter in layer.subspace_coef
    }
    if not layers:
        raise SubspaceError(f"The model has no task {adapter!r} in a basis: give a PeftModel of a SubspaceConfig.")
    draw = torch.Generator().manual_seed(seed)
    sketches = {name: _Sketch(layer, adapter, width, draw) for name, layer in layers.items()}
    trained = {module: module.training for module in model.modules()}
    model.eval()
    count = 0
    try:
        with ExitStack() as hooks, torch.enable_grad():
            for sketch in sketches.values():
                handle = sketch.layer.register_forward_hook(sketch.add)
                hooks.callback(handle.remove)
            for batch in batches:
                value = (_loss if loss is None else loss)(model, batch)
                _add_gradients(value, sketches)
                count += 1
    finally:
        for module, mode in trained.items():
            module.training = mode
    if not count:
        raise SubspaceError("There is no batch to take a gradient of. Give a few of the training data.")
    return {name: sketch.beside() for name, sketch in sketches.items()}


def _loss(model: nn.Module, batch: Any) -> torch.Tensor:
    if not isinstance(batch, Mapping):
        raise SubspaceError(
            f"A batch is a {type(batch).__name__}, and model(**batch) takes a dict: give loss=, a function of model"
            " and batch."
        )
    device = next(model.parameters()).device
    moved = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    value = getattr(model(**moved), "loss", None)
    if value is None:
        raise SubspaceError("The model returns no loss: put labels into the batches, or give loss=.")
    return value


def _add_gradients(value: Any, sketches: Mapping[str, _Sketch]) -> None:
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not torch.isfinite(value).all():
        shown = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else type(value).__name__
        raise SubspaceError(f"The loss of a batch is {shown}, no finite number. Look at the data, or give loss=.")
    probes = [probe for sketch in sketches.values() for probe in sketch.probes]
    if not value.requires_grad:
        raise SubspaceError("The loss does not depend on any adapted module, so it has no gradient for them.")
    # not backward(): the model's own parameters keep the gradients that they have
    grads = iter(torch.autograd.grad(value.reshape(()), probes, allow_unused=True))
    for sketch in sketches.values():
        for total in sketch.totals:
            grad = next(grads)
            if grad is not None:
                total += grad.double().cpu()


class _Sketch:
    """The sketches of one module's gradient for ΔW: gradients of probes that add nothing to its output.

    The output gets ``(b Ωᵀ + Ψ a + U c V) x`` with b, a and c zero: their gradients are ``G Ω``, ``Ψᵀ G`` and
    ``Uᵀ G Vᵀ``. So every kind of layer is sketched by what it computes itself.
    """

    def __init__(self, layer: Any, adapter: str, width: int, draw: torch.Generator) -> None:
        self.layer = layer
        U, V = layer.subspace_U[adapter].detach().float(), layer.subspace_V[adapter].detach().float()
        self.out, self.size = U.shape[0], V.shape[1]
        self.width = min(width, self.out, self.size)
        rows = min(2 * self.width + 1, self.out)
        random = [torch.randn(d, n, generator=draw) for d, n in ((self.size, self.width), (self.out, rows))]
        # orthonormal columns: as good, and better conditioned
        self.omega, self.psi = (torch.linalg.qr(each)[0].to(U.device) for each in random)
        self.U, self.V = U, V
        shapes = ((self.out, self.width), (rows, self.size), (U.shape[1], V.shape[0]))
        self.probes = [torch.zeros(shape, device=U.device, requires_grad=True) for shape in shapes]
        self.totals = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]

    def add(self, layer: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """Add the probes' zero to the layer's output, as a forward hook."""
        b, a, c = self.probes
        x = args[0]
        with torch.autocast(output.device.type, enabled=False):
            paths = ((self.omega.T, b), (a, self.psi), (self.V, self.U @ c))
            zero = sum(layer.leave(layer.enter(x, inner.contiguous()), outer) for inner, outer in paths)
        return output + zero.to(output.dtype)

    def beside(self) -> GradientBeside:
        """Return what the basis leaves of the gradient."""
        omega, psi, U, V = (each.double().cpu() for each in (self.omega, self.psi, self.U, self.V))
        out, inner, core = self.totals
        Y, Z = out - U @ (core @ (V @ omega)), inner - (psi.T @ U) @ core @ V
        Q = torch.linalg.qr(Y)[0]
        # R ≈ Q X with (Ψᵀ Q) X = Ψᵀ R, by least squares
        X = torch.linalg.lstsq(psi.T @ Q, Z, driver="gelsd").solution
        squares = torch.linalg.svdvals(X).square()
        # what is left of a gradient that the basis follows whole is the rounding of float32
        whole = float(squares.sum()) + float(core.square().sum())
        squares = torch.where(squares > 1e-10 * whole, squares, torch.zeros_like(squares))
        return GradientBeside(squares, whole, self.out + self.size)
