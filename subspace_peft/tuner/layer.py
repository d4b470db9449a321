"""The part of all adapter layers: ``x → V x → C · → U ·`` beside a frozen layer, tensors by adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..basis import ModuleBasis, SubspaceBasis
from .buffers import SharedBuffers
from .coefficients import Coefficients, default_scale, make_coefficients
from .fused import Terms
from .learning_rate import watch
from .load_tracker import LoadTracker
from .own_directions import OwnUnits, own_units, start_own
from .plan import InjectionPlan
from .row_batch import RowBank
from .row_context import RowSlot
from .row_own import product
from .start import start_of
from .targets import kind_of, sizes


class SubspaceLayer(BaseTunerLayer):
    """Coefficients by adapter, and the shared basis, around any layer.

    Attributes:
        subspace_coef: adapter → `Coefficients`, the only Parameters.
        subspace_U: adapter → U (out, k_out), frozen; adapters on one basis share it, as they share V, M and G.
        subspace_V: adapter → V (k_in, in).
        subspace_M: adapter → M (k_out, k_in), where its mean core is used.
        subspace_G: adapter → G (m, k_out, k_in), for `directions` coefficients.
        scaling: adapter → s, as `set_scale` and others may have changed it.
        configured_scaling: adapter → s as its config has it.
        r: adapter → (k_out, k_in).
        extra_rank: adapter → how many directions of its own it has here, φ.
        extra_scaling: adapter → s', the factor of these directions' ``u v``, as its config has it.
        bases: adapter → its whole basis, which others find by its fingerprint as long as an adapter uses it; not there
            where the task's own file brings the tensors, nor in copies of the model.
        basis_key: adapter → fingerprint and size of the basis, by which adapters find one to share.
        load_trackers: adapter → tracker of the tensors from its own file, the module's name there, the basis
            tensors that it has to bring; gone after the first forward pass.
        bank: further tasks on the basis of one of the adapters, or None.
        bank_place: the layer's name in the bank.
        row_slot: what batches of several tasks know the layer by.
    """

    adapter_layer_names = ("subspace_coef",)
    other_param_names = (
        "subspace_U",
        "subspace_V",
        "subspace_M",
        "subspace_G",
        "subspace_dropout",
        "scaling",
        "configured_scaling",
        "r",
        "extra_rank",
        "extra_scaling",
        "bases",
        "basis_key",
        "load_trackers",
    )

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        base = self.get_base_layer()
        # what PEFT asks of a layer whose weight is transposed
        self.fan_in_fan_out = isinstance(base, Conv1D)
        self.quantization_backend = resolve_quantization_backend(
            base, get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.subspace_coef = nn.ModuleDict()
        self.subspace_dropout = nn.ModuleDict()
        self.subspace_U = SharedBuffers()
        self.subspace_V = SharedBuffers()
        self.subspace_M = SharedBuffers()
        self.subspace_G = SharedBuffers()
        self.scaling: dict[str, float] = {}
        self.configured_scaling: dict[str, float] = {}
        self.r: dict[str, tuple[int, int]] = {}
        self.extra_rank: dict[str, int] = {}
        self.extra_scaling: dict[str, float] = {}
        self.bases: dict[str, SubspaceBasis] = {}
        self.basis_key: dict[str, tuple[Any, ...]] = {}
        self.load_trackers: dict[str, tuple[LoadTracker, str, set[str]]] = {}
        self.bank: RowBank | None = None
        self.bank_place = ""
        self.row_slot = RowSlot()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self.out_features, self.in_features = sizes(base)
        self.kwargs = kwargs

    # -- making an adapter ------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, plan: InjectionPlan, key: str, inference_mode: bool = False) -> None:
        """Add the adapter `adapter_name`, or replace it, as `plan` says for the module at `key`."""
        config = plan.config
        to_come = self._put_basis(adapter_name, plan, key)
        U, V = self.subspace_U[adapter_name], self.subspace_V[adapter_name]
        directions = self.subspace_G.get(adapter_name)
        coefficients = make_coefficients(
            config.coefficients,
            U.shape[1],
            V.shape[0],
            r=config.r,
            directions=0 if directions is None else directions.shape[0],
            mean_gain=config.mean_gain,
            own=(U.shape[0], V.shape[1], config.sizes.extra_of(key, {"out": U.shape[0], "in": V.shape[1]})),
        )
        scale = default_scale(config.alpha, coefficients)
        self.extra_rank[adapter_name] = coefficients.extra_rank
        self.extra_scaling[adapter_name] = self.own_units(config.alpha).scale
        self.scaling[adapter_name] = self.configured_scaling[adapter_name] = scale
        self.r[adapter_name] = (U.shape[1], V.shape[0])
        self.subspace_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self._start(coefficients, adapter_name, plan, key, to_come)
        self.subspace_coef[adapter_name] = coefficients
        watch(coefficients, scale)
        self.load_trackers.pop(adapter_name, None)
        if plan.tracker is not None:
            self._expect(adapter_name, plan.tracker, key, to_come)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        # not `set_adapter`, which walks all adapters: a thousandth one should cost what the first did
        coefficients.requires_grad_(adapter_name in self.active_adapters and not inference_mode)

    def _put_basis(self, adapter_name: str, plan: InjectionPlan, key: str) -> list[str]:
        """Hold the basis's tensors, another adapter's where it is the same.

        Returns:
            The names of those yet to come from a file.
        """
        config = plan.config
        # placeholders are empty until the task's own file fills them, and until then no other adapter shares them
        wanted = plan.basis_key(key) or ("own", adapter_name)
        self.basis_key[adapter_name] = wanted
        self.bases.pop(adapter_name, None)
        if plan.basis is not None:
            self.bases[adapter_name] = plan.basis
        hashes = plan.hashes(key)
        names = (
            "UV" + ("M" if config.mean_gain != "none" else "") + ("G" if config.coefficients == "directions" else "")
        )
        module: ModuleBasis | None = None
        to_come = []
        for name in names:
            container: SharedBuffers = getattr(self, f"subspace_{name}")
            value = next((container[twin] for twin in self._twins(adapter_name) if twin in container), None)
            if value is None and plan.basis is None:
                # TRL copies a loaded task's configuration and parameters into a second adapter, which have no basis
                # with them
                value = container.arrived(hashes.get(name))
            if value is None:
                module = module or plan.module(key)
                value = getattr(module, name)
                if plan.basis is None and value is not None:
                    to_come.append(name)
            if value is not None:
                container.put(adapter_name, value, plan.carried is not None, hashes.get(name))
        return to_come

    def _twins(self, adapter_name: str) -> Iterator[str]:
        """Yield the other adapters on the same basis."""
        wanted = self.basis_key[adapter_name]
        return (other for other, known in self.basis_key.items() if known == wanted and other != adapter_name)

    def share_basis(self, adapter_name: str, other: str) -> None:
        """Give `adapter_name` the very tensors of U and V that `other` has, which must be of its size."""
        for container in (self.subspace_U, self.subspace_V):
            container[adapter_name] = container[other]
        self.basis_key[adapter_name] = self.basis_key[other]
        if other in self.bases:
            self.bases[adapter_name] = self.bases[other]
        self.load_trackers.pop(adapter_name, None)

    def basis_part(self, adapter_name: str) -> ModuleBasis:
        """Return the adapter's part of its basis, as far as this layer has it."""
        if adapter_name in self.bases:
            _, name, k_out, k_in = self.basis_key[adapter_name]
            module = self.bases[adapter_name][name]
            return module if (k_out, k_in) == (module.k_out, module.k_in) else module.truncate(k_out, k_in)
        tensors = {name: getattr(self, f"subspace_{name}").get(adapter_name) for name in "UVMG"}
        return ModuleBasis(**{name: value.detach().cpu() for name, value in tensors.items() if value is not None})

    def _expect(self, adapter_name: str, tracker: LoadTracker, key: str, to_come: list[str]) -> None:
        self.subspace_coef[adapter_name].expect(tracker, key)
        for name in to_come:
            container: SharedBuffers = getattr(self, f"subspace_{name}")
            container.expect(adapter_name, tracker, key, f"subspace_{name}")
        self.load_trackers[adapter_name] = (tracker, key, {f"subspace_{name}" for name in to_come})

    def require_loaded(self, adapter: str) -> None:
        """Check that the adapter has the tensors that only a task's file has, before anything is made of them.

        Raises:
            BadFileError: see `LoadTracker.require`.
        """
        if (known := self.load_trackers.get(adapter)) is not None:
            tracker, key, brought = known
            tracker.require(key, {name for name, _ in self.subspace_coef[adapter].named_parameters()}, brought)

    def _check_loaded(self, adapters: Sequence[str]) -> None:
        for adapter in [name for name in adapters if name in self.load_trackers]:
            self.require_loaded(adapter)
            # another thread may have been here
            if (known := self.load_trackers.pop(adapter, None)) is not None:
                known[0].warn_unstarted()

    def _start(
        self, coefficients: Coefficients, adapter_name: str, plan: InjectionPlan, key: str, to_come: list[str]
    ) -> None:
        config = plan.config
        directions = self.subspace_G.get(adapter_name)
        core, gain = start_of(config, plan.basis, lambda: plan.module(key)) if plan.starts else (None, 0.0)
        if coefficients.gain is not None:
            with torch.no_grad():
                coefficients.gain.fill_(gain)
        core = None if core is None else core.cpu() / self.scaling[adapter_name]
        # of a saved configuration too: a new task may be made from it, and what a file brings replaces all of this
        coefficients.start(core, None if directions is None else directions.cpu())
        if coefficients.extra_rank and not to_come:
            units = self.own_units(config.alpha)
            side = self.subspace_V[adapter_name] if units.by_rows else self.subspace_U[adapter_name].T
            start_own(coefficients, side, units)
        if not config.init_weights:
            coefficients.perturb()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own looks at every adapter, and would copy the shared basis
        base_device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        target = device or base_device
        if target is None:
            return
        coefficients = self.subspace_coef[adapter_name]
        if all(parameter.device.type != "meta" for parameter in coefficients.parameters()):
            floating = dtype is not None and dtype.is_floating_point
            coefficients.to(target, dtype if floating else None)
        if target.type == "meta":
            return
        for container in (self.subspace_U, self.subspace_V, self.subspace_M, self.subspace_G):
            value = container.get(adapter_name)
            if value is not None and value.device != target and value.device.type != "meta":
                moved = value.to(target)
                for name in [other for other in container if container[other] is value]:
                    container[name] = moved

    # -- what an adapter computes -----------------------------------------------------------------------------------

    def _core(self, adapter: str) -> torch.Tensor:
        """Return ``C(θ) + g·M/s`` (k_out, k_in), detached."""
        mean, directions = self._frozen(adapter)
        with torch.no_grad():
            return self.subspace_coef[adapter].core(mean, directions)

    def _frozen(self, adapter: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        mean = self.subspace_M.get(adapter)
        return None if mean is None else mean / self.configured_scaling[adapter], self.subspace_G.get(adapter)

    def own_units(self, alpha: float) -> OwnUnits:
        """Return the units in which a task of this `alpha` stores its own directions here."""
        return own_units(alpha, *sizes(self.get_base_layer()), embedding=kind_of(self) == "embedding")

    def own_part(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the own directions' part of ΔW at the present scale as factors, detached, float32 or wider.

        Returns:
            ``(B, A)``, (out, φ) and (φ, in); None without own directions.
        """
        coefficients = self.subspace_coef[adapter]
        if not coefficients.extra_rank:
            return None
        u, v = (value.detach() for value in (coefficients.extra_U, coefficients.extra_V))
        dtype = torch.promote_types(u.dtype, torch.float32)
        return u.to(dtype) * self._own_scaling(adapter), v.to(dtype)

    def _own_scaling(self, adapter: str) -> float:
        """Return the factor of ``u v`` at the present scale: `set_scale` and the like scale the whole of a task."""
        return self.extra_scaling[adapter] * (self.scaling[adapter] / self.configured_scaling[adapter])

    def _terms(self, adapter: str, dtype: torch.dtype) -> Terms:
        """Return what a forward pass multiplies with, in `dtype`, with gradients to the coefficients."""
        U, V = self.subspace_U[adapter].to(dtype), self.subspace_V[adapter].to(dtype)
        core, u, v = self.subspace_coef[adapter](*self._frozen(adapter))
        if u is None or v is None:
            return Terms(U, core.to(dtype), V, self.scaling[adapter])
        own = self._own_scaling(adapter)
        return Terms(U, core.to(dtype), V, self.scaling[adapter], u.to(dtype), v.to(dtype), own)

    def enter(self, x: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
        """Return ``V x`` (…, k_in) for the layer's input and V (k_in, in), in V's dtype."""
        raise NotImplementedError(type(self).__name__)

    def leave(self, z: torch.Tensor, U: torch.Tensor) -> torch.Tensor:
        """Return ``U z`` in the layout of the layer's output, for z (…, k_out) and U (out, k_out)."""
        raise NotImplementedError(type(self).__name__)

    def enter_rows(self, x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """Return ``A_row x`` (n, …, φ) for each row of the input and its own A (n, φ, in), in A's dtype."""
        raise NotImplementedError(type(self).__name__)

    def leave_rows(self, z: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """Return ``B_row z`` in the output's layout, for z (n, …, φ) and each row's own Bᵀ (n, φ, out)."""
        return product(z, B)

    def add_out(self, result: torch.Tensor, z: torch.Tensor, U: torch.Tensor) -> torch.Tensor:
        """Return `result` plus ``U z`` in result's dtype; `result` may be changed where no gradient is asked for."""
        return result + self.leave(z, U).to(result.dtype)

    def add_rows(self, result: torch.Tensor, z: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """Return `result` plus ``B_row z``, as `add_out` does."""
        return result + self.leave_rows(z, B).to(result.dtype)

    def as_weight(self, delta: torch.Tensor) -> torch.Tensor:
        """Return ΔW, given as (out, in), in the base weight's layout."""
        raise NotImplementedError(type(self).__name__)

    def _dropped(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        return self.subspace_dropout[adapter](x)

    def _entered(self, x: torch.Tensor, terms: Terms) -> torch.Tensor:
        """Return ``[V; v] x`` (…, k_in + φ)."""
        return self.enter(x, terms.inner)

    def _add_update(self, result: torch.Tensor, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """Return ``result + (s · U C V + s' · u v) x``, in result's dtype."""
        terms = self._terms(adapter, result.dtype)
        h = self._entered(self._dropped(x, adapter), terms)
        return result + self.leave(terms.through(h), terms.outer)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return ΔW in the base weight's layout and the coefficients' dtype, as PEFT's own layers do.

        Raises:
            BadFileError: see `require_loaded`.
        """
        coefficients = next(self.subspace_coef[adapter].parameters())
        return self._delta(adapter).to(coefficients.dtype)

    def _delta(self, adapter: str) -> torch.Tensor:
        """Return ΔW in the base weight's layout, float32 or wider.

        So what is merged is rounded once, to the base weight's dtype.
        """
        self.require_loaded(adapter)
        U, V, core = self.subspace_U[adapter], self.subspace_V[adapter], self._core(adapter) * self.scaling[adapter]
        dtype = torch.promote_types(U.dtype, torch.float32)
        delta = (U.to(dtype) @ core.to(dtype)) @ V.to(dtype)
        if (own := self.own_part(adapter)) is not None:
            delta = torch.addmm(delta, own[0].to(dtype), own[1].to(dtype))
        return self.as_weight(delta)

    # -- scale, as PEFT's LoRA layers have it -----------------------------------------------------------------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set s to `scale` times its configured value."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.configured_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply s of the active adapters by `scale`."""
        if scale != 1:
            for adapter in self.active_adapters:
                if adapter in self.scaling:
                    self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer(scale)`; None returns to the configured s."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                known = self.configured_scaling[adapter]
                self.scaling[adapter] = known if scale is None else self.scaling[adapter] / scale

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell whether PEFT's `convert_to_lora` can convert this layer: it takes ΔW for a matrix.

        `export_lora` converts layers of all kinds.
        """
        return kind_of(self) == "linear"


def require_loaded(model: nn.Module, adapter_name: str) -> None:
    """Check that an adapter of a live model has all its tensors, as `SubspaceLayer.require_loaded` does by layer."""
    for layer in model.modules():
        if isinstance(layer, SubspaceLayer) and layer.load_trackers:
            layer.require_loaded(adapter_name)


def basis_in(model: nn.Module, adapter_name: str) -> SubspaceBasis | None:
    """Return the basis of an adapter of a live model; None where the layers have only its own file's tensors."""
    layers = (layer for layer in model.modules() if isinstance(layer, SubspaceLayer))
    return next((layer.bases[adapter_name] for layer in layers if adapter_name in layer.bases), None)
