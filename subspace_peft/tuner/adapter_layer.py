"""An adapter layer's life: made around a layer, run, merged into its weight and taken out again."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import quantization_extra_repr
from torch import nn

from ..errors import SubspaceError
from .bnb import KeptWeight, unpack
from .layer import SubspaceLayer
from .learning_rate import watch
from .plan import InjectionPlan
from .row_batch import add_updates, check_rows
from .row_context import RowSlot, check_thread, names_here, weight_changes


class AdapterLayer(nn.Module, SubspaceLayer):
    """An adapter layer: how it is made, run and merged, whatever the kind of the layer inside.

    Args:
        base_layer: the layer inside.
        adapter_name: the first adapter's name.
        plan: the adapter's.
        key: the layer's name in the base model, kept as `key`.
        kwargs: settings of the model for PEFT's quantisation backends.
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

    def __setstate__(self, state: dict[str, Any]) -> None:
        # a layer that an earlier version pickled lacks some attributes, and has another under its earlier name
        state = {"bases": {}, "row_slot": RowSlot(), "extra_rank": {}, "extra_scaling": {}, **state}
        if "arrivals" in state:
            state["load_trackers"] = state.pop("arrivals")
        super().__setstate__(state)
        for name, coefficients in self.subspace_coef.items():
            watch(coefficients, self.configured_scaling[name])

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the base layer's output with the updates of the active adapters, or of each row's own task."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            names = names_here(self.row_slot, self.training)
        if names is not None:
            check_rows(self, x, names)
        if self.load_trackers and not self._disable_adapters:
            self._check_loaded(self.active_adapters if names is None else names)
        if self._disable_adapters:
            if names is not None:
                check_thread(self.row_slot)
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged_adapters:
            return self.base_layer(x, *args, **kwargs)
        if names is not None:
            return self._with_rows(x, names, *args, **kwargs)
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

    def _with_rows(self, x: torch.Tensor, names: Sequence[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        changes = weight_changes(self.row_slot)
        result = add_updates(self, self._base_result(x, *args, **kwargs), x, names)
        if weight_changes(self.row_slot) != changes:
            raise SubspaceError(
                f"Module {self.key!r}: another thread merged or unmerged adapters while a batch of several tasks was"
                " computed. Merge while no batch is under way."
            )
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
            ValueError: NaN or infinite values, with `safe_merge`.
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
            self._check_loaded([adapter])
            if backend is not None:
                unpack(self.get_base_layer())
                self._kept = self._kept if self.merged_adapters else KeptWeight.of(self.get_base_layer())
            with self._changing():
                self._add_to_base(adapter, 1.0, safe_merge)
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take all merged updates out of the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        with self._changing():
            if self._kept is not None:
                self._kept.restore(self.get_base_layer())
                self._kept = None
                self.merged_adapters.clear()
            while self.merged_adapters:
                adapter = self.merged_adapters.pop()
                if adapter in self.subspace_coef:
                    self._add_to_base(adapter, -1.0, False)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Let batches in other threads see that the base weight is changed meanwhile."""
        self.row_slot.changes += 1
        try:
            yield
        finally:
            self.row_slot.changes += 1

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable the adapters, for all threads; batches of several tasks in others refuse to go on."""
        self.row_slot.disabled_by = None if enabled else threading.get_ident()
        super().enable_adapters(enabled)

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
        """Return PEFT's own description of a quantised weight."""
        return quantization_extra_repr(self)
