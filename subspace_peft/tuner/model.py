"""The tuner that PEFT drives: finds the basis, checks that it fits, puts adapter layers in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, get_quantization_kwargs
from torch import nn

from ..errors import SubspaceError
from .bnb import keep_unpacked
from .config import SubspaceConfig
from .injection import Plan, fill_target_modules, make_plan
from .layer import SubspaceLayer
from .layers import make_layer
from .merging import add_weighted
from .registration import PREFIX
from .row_batch import task_names_passed
from .targets import outer_modules, target_names


class SubspaceModel(BaseTuner):
    """A model whose target layers train coefficients in a frozen shared basis.

    Example:
        >>> from peft import get_peft_model
        >>> from subspace_peft import SubspaceConfig
        >>> model = get_peft_model(base_model, SubspaceConfig(basis="my-basis", task_type="SEQ_CLS"))
    """

    prefix = PREFIX
    tuner_layer_cls = SubspaceLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_adapter_config(self, peft_config: SubspaceConfig, model_config: dict[str, Any]) -> SubspaceConfig:
        fill_target_modules(peft_config, self.model)
        return super()._prepare_adapter_config(peft_config, model_config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # `state_dict` decides which modules are adapted; the plan has to be for the same ones
        given = kwargs.get("state_dict")
        self._given = (
            None if given is None else {key.rsplit(f".{PREFIX}", 1)[0].removeprefix("_orig_mod.") for key in given}
        )
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        _keep_out_of_broadcasts(model, adapter_name)

    def _prepare_model(self, peft_config: SubspaceConfig, model: nn.Module) -> None:
        # the last hook before PEFT starts to replace modules: whatever is wrong has to come up here
        keep_unpacked(model)
        targets = target_names(model, peft_config, getattr(self, "_given", None))
        if targets:
            peft_config._plan = make_plan(model, peft_config, targets)

    def _create_and_replace(
        self,
        peft_config: SubspaceConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        plan: Plan = peft_config._plan
        if isinstance(target, SubspaceLayer):
            target.update_layer(adapter_name, plan, current_key, inference_mode=peft_config.inference_mode)
            if adapter_name not in self.active_adapters:
                target.subspace_coef[adapter_name].requires_grad_(False)
            return
        layer = make_layer(target, adapter_name, plan, current_key, **get_quantization_kwargs(self.model))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        if not isinstance(config, SubspaceConfig):
            raise SubspaceError(f"SubspaceModel takes a SubspaceConfig, got {type(config).__name__}.")

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        svd_rank: int | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add the adapter `adapter_name`, a weighted combination of loaded ones on one basis, computed on their cores.

        ``linear`` (and ``cat``) is exact: ΔW = Σ w ΔW_i. ``ties``, ``dare_linear``, ``dare_ties`` and
        ``magnitude_prune`` are PEFT's own, applied to cores instead of factors. ``svd`` and ``…_svd`` cut the result
        to rank `svd_rank` (`factor` coefficients), which is optimal since U and V are orthonormal. A fleet's mean that
        an adapter adds is part of what is merged.

        Args:
            adapters, weights: names of loaded adapters, and a weight for each.
            density: share of numbers that the pruning kinds keep.
            majority_sign_method: ``total`` or ``frequency``, for ties.

        Raises:
            SubspaceError: unknown names or kinds, lists of different lengths, a density that is missing.
            BasisMismatchError: the adapters are on different bases, or use different parts of one.
        """
        add_weighted(
            self,
            adapters,
            weights,
            adapter_name,
            combination_type=combination_type,
            svd_rank=svd_rank,
            density=density,
            majority_sign_method=majority_sign_method,
        )

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        with task_names_passed(self.model, SubspaceLayer, self.training, kwargs):
            yield


def _keep_out_of_broadcasts(model: nn.Module, adapter_name: str) -> None:
    """Tell `DistributedDataParallel` not to broadcast the frozen basis at every forward pass, as it does with all
    buffers: every process has loaded the same, by fingerprint.
    """
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    for name, layer in outer_modules(model):
        if isinstance(layer, SubspaceLayer):
            for kind in "UVMG":
                if adapter_name in getattr(layer, f"subspace_{kind}"):
                    own = f"{name}.subspace_{kind}.{adapter_name}"
                    # as it is called in the model itself, in this tuner and in a PeftModel
                    ignored |= {own, f"model.{own}", f"base_model.model.{own}"}
    model._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]
