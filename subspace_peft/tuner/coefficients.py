"""Parameterisations of the core C(θ) of one module: all kinds behind one interface."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import BadFileError
from .load_tracker import LoadTracker

KINDS = ("core", "factor", "diagonal", "directions", "none")
USUAL_ALPHA = 256.0  # a config's default, at which scales and rates were measured
OWN = ("extra_U", "extra_V")  # the trained tensors of a task's own directions


class Trained(NamedTuple):
    """What a task has trained in one module, as a forward pass uses it.

    Attributes:
        core: ``C(θ) + g·M`` (k_out, k_in).
        extra_U: (out, φ), or None without own directions.
        extra_V: (φ, in), or None.
    """

    core: torch.Tensor
    extra_U: torch.Tensor | None
    extra_V: torch.Tensor | None


class Coefficients(nn.Module):
    """The trained parameters of one task in one module.

    A call gives the core ``C(θ) + g·M`` (k_out, k_in) and the own directions. Every trained tensor lies on this module
    and is used inside its call, so that hooks which gather or onload parameters (ZeRO, FSDP, CPU offload) see it.

    Attributes:
        steps: how many parameters one Adam step moves the core by; the scale makes that step's size the same for all.
        gain: (1,) trained gain g of the mean core, or None.
        extra_U: (out, φ) the task's own directions beside U, or None.
        extra_V: (φ, in) those beside V, or None.
    """

    def __init__(self, k_out: int, k_in: int, steps: int, mean_gain: str) -> None:
        super().__init__()
        self.k_out, self.k_in, self.steps = k_out, k_in, steps
        self.gain = nn.Parameter(torch.zeros(1)) if mean_gain == "trainable" else None
        self.extra_U: nn.Parameter | None = None
        self.extra_V: nn.Parameter | None = None
        self._origin: tuple[LoadTracker, str] | None = None

    @property
    def extra_rank(self) -> int:
        """How many directions of its own the task has here, φ."""
        # coefficients that an earlier version pickled have no such attribute
        own = self._parameters.get("extra_V")
        return 0 if own is None else own.shape[0]

    def add_own(self, out_features: int, in_features: int, rank: int) -> None:
        """Add `rank` directions of the task's own to each side, zero until `start_own` or a file fills them."""
        self.extra_U = nn.Parameter(torch.zeros(out_features, rank))
        self.extra_V = nn.Parameter(torch.zeros(rank, in_features))

    def expect(self, tracker: LoadTracker, module: str) -> None:
        """Note in `tracker` which of the trained tensors of `module` come from its file."""
        self._origin = (tracker, module)
        self.register_load_state_dict_pre_hook(_note_loaded)

    def _came(self, name: str) -> None:
        if self._origin is not None:
            self._origin[0].note(self._origin[1], name)

    def __setattr__(self, name: str, value: Any) -> None:
        # transformers' own loader assigns tensors by name instead of calling load_state_dict
        if name in self.__dict__.get("_parameters", ()) and isinstance(value, nn.Parameter):
            if value.device.type != "meta" and not torch.isfinite(value).all():
                raise BadFileError(
                    f"{'coefficients' if self._origin is None else self._origin[1]}: {name} holds NaN or infinite"
                    " values. The task's training diverged, or the file is damaged: fetch or train it again."
                )
            self._came(name)
        super().__setattr__(name, value)

    def core(self, mean: torch.Tensor | None = None, directions: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``C(θ) + g·M`` (k_out, k_in).

        Args:
            mean: M (k_out, k_in) in units of the core, or None for none.
            directions: G (m, k_out, k_in), for the kind that needs them.
        """
        core = self.own_core(directions)
        if mean is not None:
            core = core + (mean.to(core.dtype) if self.gain is None else self.gain * mean.to(core.dtype))
        return core

    def own_core(self, directions: torch.Tensor | None) -> torch.Tensor:
        """Return C(θ) (k_out, k_in); `directions` as in `core`."""
        raise NotImplementedError(type(self).__name__)

    def start(self, core: torch.Tensor | None, directions: torch.Tensor | None) -> None:
        """Set θ so that C(θ) is nearest to `core` (k_out, k_in), or zero for None."""
        raise NotImplementedError(type(self).__name__)

    def perturb(self) -> None:
        """Draw a small random θ, so that the update is not zero (`init_weights=False`)."""
        for parameter in self.parameters():
            if parameter.device.type != "meta":
                nn.init.normal_(parameter, std=0.02)

    def forward(self, mean: torch.Tensor | None = None, directions: torch.Tensor | None = None) -> Trained:
        """Return ``C(θ) + g·M`` as `core` does, and the own directions, in tensors of their own."""
        # a parameter itself may be emptied by such hooks once this call is over
        core = _copied(self.core(mean, directions))
        if not self.extra_rank:
            return Trained(core, None, None)
        return Trained(core, _copied(self.extra_U), _copied(self.extra_V))

    @property
    def dtype(self) -> torch.dtype:
        """The trained tensors' dtype."""
        return next(self.parameters()).dtype

    def extra_repr(self) -> str:
        """Return the core's shape and the number of own directions, for a printed model."""
        own = f", extra_rank={self.extra_rank}" if self.extra_rank else ""
        return f"k_out={self.k_out}, k_in={self.k_in}{own}"


def _copied(value: torch.Tensor) -> torch.Tensor:
    return value.clone() if isinstance(value, nn.Parameter) else value


def _note_loaded(module: Coefficients, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in module._parameters:
        if prefix + name in state_dict:
            module._came(name)


class Core(Coefficients):
    """θ is the core itself, (k_out, k_in): LoRA-XS (arXiv 2405.17604), JD-Full (arXiv 2407.00066)."""

    def __init__(self, k_out: int, k_in: int, mean_gain: str) -> None:
        super().__init__(k_out, k_in, k_out * k_in, mean_gain)
        self.weight = nn.Parameter(torch.zeros(k_out, k_in))

    def own_core(self, directions: torch.Tensor | None) -> torch.Tensor:
        """Return C(θ): θ itself."""
        return self.weight

    def start(self, core: torch.Tensor | None, directions: torch.Tensor | None) -> None:
        """Set θ to `core`, or to zero."""
        with torch.no_grad():
            self.weight.zero_() if core is None else self.weight.copy_(core)


class Factor(Coefficients):
    """``C = up · down`` of rank r: EigenLoRAx (arXiv 2502.04700), SubspaceAdapter (2512.05117), Share (2602.06043).

    Only `up` starts at zero: with both at zero neither would ever get a gradient.
    """

    def __init__(self, k_out: int, k_in: int, r: int, mean_gain: str) -> None:
        r = min(r, k_out, k_in)
        super().__init__(k_out, k_in, k_out * r, mean_gain)
        self.up = nn.Parameter(torch.zeros(k_out, r))
        self.down = nn.Parameter(torch.zeros(r, k_in))

    def own_core(self, directions: torch.Tensor | None) -> torch.Tensor:
        """Return C(θ): up · down."""
        return self.up @ self.down

    def start(self, core: torch.Tensor | None, directions: torch.Tensor | None) -> None:
        """Set the factors to the best ones of rank r, or `up` to zero and `down` to random orthonormal rows."""
        with torch.no_grad():
            if core is None:
                self.up.zero_()
                if self.down.device.type != "meta":
                    nn.init.orthogonal_(self.down)
                return
            P, S, Th = torch.linalg.svd(core.float(), full_matrices=False)
            r = self.down.shape[0]
            self.up.copy_(P[:, :r] * S[:r])
            self.down.copy_(Th[:r])


class Diagonal(Coefficients):
    """``C = diag(θ)``, k parameters: SVFT, JD-Diag."""

    def __init__(self, k_out: int, k_in: int, mean_gain: str) -> None:
        k = min(k_out, k_in)
        super().__init__(k_out, k_in, k, mean_gain)
        self.weight = nn.Parameter(torch.zeros(k))

    def own_core(self, directions: torch.Tensor | None) -> torch.Tensor:
        """Return C(θ): diag(θ), padded to (k_out, k_in)."""
        k = self.weight.shape[0]
        return F.pad(torch.diag(self.weight), (0, self.k_in - k, 0, self.k_out - k))

    def start(self, core: torch.Tensor | None, directions: torch.Tensor | None) -> None:
        """Set θ to the diagonal of `core`, or to zero."""
        with torch.no_grad():
            self.weight.zero_() if core is None else self.weight.copy_(core.diagonal()[: self.weight.shape[0]])


class Directions(Coefficients):
    """``C = Σ_j θ_j G_j`` with frozen G (m, k_out, k_in): UWSH's scalars per layer (arXiv 2512.05117), NOLA."""

    def __init__(self, k_out: int, k_in: int, m: int, mean_gain: str) -> None:
        super().__init__(k_out, k_in, m, mean_gain)
        self.weight = nn.Parameter(torch.zeros(m))

    def own_core(self, directions: torch.Tensor | None) -> torch.Tensor:
        """Return C(θ): Σ_j θ_j G_j."""
        if directions is None:
            raise RuntimeError("the `directions` coefficients need the basis's directions G")
        return torch.einsum("m,moi->oi", self.weight, directions.to(self.weight.dtype))

    def start(self, core: torch.Tensor | None, directions: torch.Tensor | None) -> None:
        """Set θ to the least-squares solution of ``Σ_j θ_j G_j = core``, or to zero."""
        with torch.no_grad():
            if core is None or directions is None:
                self.weight.zero_()
                return
            flat = directions.flatten(1).float().T
            self.weight.copy_(torch.linalg.lstsq(flat, core.float().flatten()[:, None]).solution[:, 0])


class MeanOnly(Coefficients):
    """``C = 0``: of the core only the mean's gain is trained. The control that a fleet's basis has to beat."""

    def __init__(self, k_out: int, k_in: int, mean_gain: str) -> None:
        super().__init__(k_out, k_in, 1, mean_gain)

    def own_core(self, directions: torch.Tensor | None) -> torch.Tensor:
        """Return C(θ): zeros."""
        return torch.zeros(self.k_out, self.k_in, dtype=self.dtype, device=next(self.parameters()).device)

    def start(self, core: torch.Tensor | None, directions: torch.Tensor | None) -> None:
        """Set nothing: this kind has no θ."""


def make_coefficients(
    kind: str,
    k_out: int,
    k_in: int,
    *,
    r: int,
    directions: int,
    mean_gain: str,
    own: tuple[int, int, int] | None = None,
) -> Coefficients:
    """Return the coefficients of one module, at zero.

    Args:
        kind: one of `KINDS`.
        k_out: rows of the core.
        k_in: columns of the core.
        r: rank, for `factor`.
        directions: how many direction tensors the basis has, for `directions`.
        mean_gain: ``trainable`` adds the trained gain g of the mean core.
        own: out, in and the number φ of the task's own directions; None for none.
    """
    made = _made(kind, k_out, k_in, r, directions, mean_gain)
    if own is not None and own[2]:
        made.add_own(*own)
    return made


def _made(kind: str, k_out: int, k_in: int, r: int, directions: int, mean_gain: str) -> Coefficients:
    if kind == "none":
        return MeanOnly(k_out, k_in, mean_gain)
    if kind == "core":
        return Core(k_out, k_in, mean_gain)
    if kind == "factor":
        return Factor(k_out, k_in, r, mean_gain)
    if kind == "diagonal":
        return Diagonal(k_out, k_in, mean_gain)
    return Directions(k_out, k_in, directions, mean_gain)


def default_scale(alpha: float, coefficients: Coefficients) -> float:
    """Return ``s = α / √steps``: an Adam step of rate η moves ΔW by at most α·η in Frobenius norm, whatever k."""
    return alpha / math.sqrt(coefficients.steps)
