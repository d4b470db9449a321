"""The part of all adapter layers: ``x → V x → C · → U ·`` beside a frozen layer, tensors by adapter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..basis import ModuleBasis, SubspaceBasis
from ..errors import SubspaceError
from .bnb import KeptWeight, unpack
from .buffers import SharedBuffers
from .coefficients import Coefficients, default_scale, make_coefficients
from .injection import source_index
from .load_tracker import Arrivals
from .plan import InjectionPlan
from .row_batch import RowBank, add_updates, check_rows
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
        bases: adapter → its whole basis, which others find by its fingerprint as long as an adapter uses it; not there
            where the task's own file brings the tensors, nor in copies of the model.
        basis_key: adapter → fingerprint and size of the basis, by which adapters find one to share.
        arrivals: adapter → record of the tensors that came from its own file, the module's name there, the basis
            tensors that it has to bring; gone after the first forward pass.
        bank: further tasks on the basis of one of the adapters, or None.
        bank_place: where in a row of the bank this layer's core begins, and its (k_in, k_out).
        batch_names: while `row_batch.task_names_passed` is open, a task name per row.
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
        "bases",
        "basis_key",
        "arrivals",
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
        self.bases: dict[str, SubspaceBasis] = {}
        self.basis_key: dict[str, tuple[Any, ...]] = {}
        self.arrivals: dict[str, tuple[Arrivals, str, set[str]]] = {}
        self.bank: RowBank | None = None
        self.bank_place = (0, 0, 0)
        self.batch_names: Sequence[str] | None = None
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
        )
        scale = default_scale(config.alpha, coefficients)
        self.scaling[adapter_name] = self.configured_scaling[adapter_name] = scale
        self.r[adapter_name] = (U.shape[1], V.shape[0])
        self.subspace_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self._start(coefficients, adapter_name, plan, key)
        self.subspace_coef[adapter_name] = coefficients
        self.arrivals.pop(adapter_name, None)
        if plan.arrivals is not None:
            self._expect(adapter_name, plan.arrivals, key, to_come)
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
                container.put(adapter_name, value, config, hashes.get(name))
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
        self.arrivals.pop(adapter_name, None)

    def basis_part(self, adapter_name: str) -> ModuleBasis:
        """Return the adapter's part of its basis, as far as this layer has it."""
        if adapter_name in self.bases:
            _, name, k_out, k_in = self.basis_key[adapter_name]
            return self.bases[adapter_name][name].truncate(k_out, k_in)
        tensors = {name: getattr(self, f"subspace_{name}").get(adapter_name) for name in "UVMG"}
        return ModuleBasis(**{name: value.detach().cpu() for name, value in tensors.items() if value is not None})

    def _expect(self, adapter_name: str, arrivals: Arrivals, key: str, to_come: list[str]) -> None:
        self.subspace_coef[adapter_name].expect(arrivals, key)
        for name in to_come:
            container: SharedBuffers = getattr(self, f"subspace_{name}")
            container.expect(adapter_name, arrivals, key, f"subspace_{name}")
        self.arrivals[adapter_name] = (arrivals, key, {f"subspace_{name}" for name in to_come})

    def _check_arrivals(self, adapters: Sequence[str]) -> None:
        for adapter in [name for name in adapters if name in self.arrivals]:
            arrivals, key, brought = self.arrivals[adapter]
            arrivals.check(key, {name for name, _ in self.subspace_coef[adapter].named_parameters()}, brought)
            del self.arrivals[adapter]

    def _start(self, coefficients: Coefficients, adapter_name: str, plan: InjectionPlan, key: str) -> None:
        config = plan.config
        directions = self.subspace_G.get(adapter_name)
        core = None
        if plan.basis is not None and not config.loaded and config.start != "zero":
            module = plan.module(key)
            if config.start == "mean" and config.mean_gain == "trainable":
                with torch.no_grad():
                    coefficients.gain.fill_(1.0)
            elif config.start == "mean":
                core = module.M if config.mean_gain == "none" else None
            else:
                core = module.cores[source_index(config, plan.basis)]
                if config.mean_gain == "fixed":
                    core = core - module.M
        core = None if core is None else core.cpu() / self.scaling[adapter_name]
        coefficients.start(core, None if directions is None else directions.cpu())
        if not config.init_weights and not config.loaded:
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

    def enter(self, x: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
        """Return ``V x`` (…, k_in) for the layer's input and V (k_in, in), in V's dtype."""
        raise NotImplementedError(type(self).__name__)

    def leave(self, z: torch.Tensor, U: torch.Tensor) -> torch.Tensor:
        """Return ``U z`` in the layout of the layer's output, for z (…, k_out) and U (out, k_out)."""
        raise NotImplementedError(type(self).__name__)

    def add_out(self, result: torch.Tensor, z: torch.Tensor, U: torch.Tensor) -> torch.Tensor:
        """Return `result` plus ``U z`` in result's dtype; `result` may be changed where no gradient is asked for."""
        return result + self.leave(z, U).to(result.dtype)

    def as_weight(self, delta: torch.Tensor) -> torch.Tensor:
        """Return ΔW, given as (out, in), in the base weight's layout."""
        raise NotImplementedError(type(self).__name__)

    def _dropped(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        return self.subspace_dropout[adapter](x)

    def _add_update(self, result: torch.Tensor, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """Return ``result + s · U C V x``, in result's dtype."""
        dtype = result.dtype
        U, V = self.subspace_U[adapter].to(dtype), self.subspace_V[adapter].to(dtype)
        core = self.subspace_coef[adapter](*self._frozen(adapter)).to(dtype)
        h = self.enter(self._dropped(x, adapter), V)
        return result + self.leave(F.linear(h, core * self.scaling[adapter]), U)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return ΔW in the base weight's layout and the coefficients' dtype, as PEFT's own layers do."""
        coefficients = next(self.subspace_coef[adapter].parameters())
        return self._delta(adapter).to(coefficients.dtype)

    def _delta(self, adapter: str) -> torch.Tensor:
        """Return ΔW in the base weight's layout, float32 or wider.

        So what is merged is rounded once, to the base weight's dtype.
        """
        U, V, core = self.subspace_U[adapter], self.subspace_V[adapter], self._core(adapter) * self.scaling[adapter]
        dtype = torch.promote_types(U.dtype, torch.float32)
        return self.as_weight((U.to(dtype) @ core.to(dtype)) @ V.to(dtype))

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


class AdapterLayer(nn.Module, SubspaceLayer):
    """An adapter layer: how it is made, run and merged, whatever the kind of the layer inside.

    Args:
        base_layer: the layer inside.
        adapter_name: the first adapter's name.
        plan: the adapter's.
        key: the layer's name in the base model, kept as `key`.
        kwargs: what PEFT's quantisation backends need of the model.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, plan: InjectionPlan, key: str, **kwargs: Any) -> None:
        super().__init__()
        SubspaceLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.key = key
        self._kept: KeptWeight | None = None
        self.update_layer(adapter_name, plan, key, inference_mode=plan.config.inference_mode)

    def __getstate__(self) -> dict[str, Any]:
        # a pickled or copied layer has the tensors that it uses; the whole basis is found by its fingerprint
        return {**self.__dict__, "bases": {}}

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the base layer's output with the updates of the active adapters, or of each row's own task."""
        names = kwargs.pop("adapter_names", self.batch_names)
        if names is not None:
            check_rows(self, x, names)
        if self.arrivals and not self._disable_adapters:
            self._check_arrivals(self.active_adapters if names is None else names)
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged_adapters:
            return self.base_layer(x, *args, **kwargs)
        if names is not None:
            return add_updates(self, self._base_result(x, *args, **kwargs), x, names)
        adapters = [adapter for adapter in self.active_adapters if adapter in self.subspace_coef]
        result = self._with_first(x, adapters[0]) if adapters and not args and not kwargs else None
        if result is None:
            result = self._base_result(x, *args, **kwargs)
        else:
            del adapters[0]
        for adapter in adapters:
            result = self._add_update(result, x, adapter)
        return result

    def _base_result(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        return result

    def _with_first(self, x: torch.Tensor, adapter: str) -> torch.Tensor | None:
        """Return the base layer's output with the update of `adapter`, or None where that is not quicker in one."""
        return None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' updates to the base weight; `safe_merge` works on a copy and refuses non-finite results.

        A quantised weight is rounded again to what its kind can represent. Until `unmerge`, which gives it back bit
        for bit, one quantised by bitsandbytes is kept beside the merged one.

        Raises:
            SubspaceError: the weight is of a quantised kind that cannot be changed.
            ValueError: NaN or infinite numbers, with `safe_merge`.
        """
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise SubspaceError(
                f"Module {self.key!r}: {backend.backend_name} weights cannot be changed, so nothing can be merged"
                " into them. Load the base model unquantised to merge, or leave the adapter beside it."
            )
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.subspace_coef:
                continue
            self._check_arrivals([adapter])
            if backend is not None:
                unpack(self.get_base_layer())
                self._kept = self._kept if self.merged_adapters else KeptWeight.of(self.get_base_layer())
            self._add_to_base(adapter, 1.0, safe_merge)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take all merged updates out of the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._kept is not None:
            self._kept.restore(self.get_base_layer())
            self._kept = None
            self.merged_adapters.clear()
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if adapter in self.subspace_coef:
                self._add_to_base(adapter, -1.0, False)

    def _add_to_base(self, adapter: str, sign: float, safe: bool) -> None:
        weight = self.get_base_weight()
        delta = self._delta(adapter).to(weight.device) * sign
        merged = (weight.to(delta.dtype) + delta).to(weight.dtype)
        if safe and not torch.isfinite(merged).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
        if self.quantization_backend is None:
            # in place, so that other holders of this weight see the same
            weight.copy_(merged)
        else:
            self.set_base_weight(merged)

    def __repr__(self) -> str:
        return "subspace." + super().__repr__()

    def extra_repr(self) -> str:
        """Return what PEFT's layers say of a quantised weight."""
        return quantization_extra_repr(self)
