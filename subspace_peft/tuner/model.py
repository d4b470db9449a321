"""The tuner that PEFT drives: finds the basis, checks that it fits, puts adapter layers in."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, get_quantization_kwargs
from torch import nn

from ..basis import SubspaceBasis
from ..basis.base_notes import take_record
from ..basis.module_names import unwrapped_name
from ..errors import SubspaceError
from .adapter_names import check_adapter_name
from .bnb import keep_unpacked
from .carried import add_basis, carried_in
from .config import SubspaceConfig
from .injection import fill_target_modules, make_plan
from .layer import SubspaceLayer, require_loaded
from .layer_kinds import make_layer
from .merging import add_weighted
from .module_names import rename_keys
from .peft_type import PREFIX
from .plan import InjectionPlan
from .renaming import by_layer_names, under_model_names
from .row_names import task_names_passed
from .targets import outer_modules, target_names

_injecting = threading.RLock()


class SubspaceModel(BaseTuner):
    """A model whose target layers train coefficients in a frozen shared basis.

    Examples:
        >>> from peft import get_peft_model
        >>> from subspace_peft import SubspaceConfig
        >>> model = get_peft_model(base_model, SubspaceConfig(basis="my-basis", task_type="SEQ_CLS"))
    """

    prefix = PREFIX
    tuner_layer_cls = SubspaceLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    @property
    def bases(self) -> dict[str, SubspaceBasis]:
        """Adapter → its basis, of adapters whose basis is not in their own file alone. The layers hold them."""
        layers = [layer for layer in self.model.modules() if isinstance(layer, SubspaceLayer)]
        return {adapter: basis for layer in layers for adapter, basis in layer.bases.items()}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put the adapter's layers in, as PEFT's own does."""
        # one at a time: the plan, and PEFT's own steps, are of one adapter
        with _injecting:
            check_adapter_name(adapter_name, self.peft_config)
            heads = getattr(self.peft_config[adapter_name], "modules_to_save", None)
            if isinstance(heads, list):
                # PEFT's task types have just appended theirs, whether they were there or not
                heads[:] = dict.fromkeys(heads)
            self._inject(model, adapter_name, *args, **kwargs)

    def _inject(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # `state_dict` decides which modules are adapted; the plan has to be for the same ones
        given = kwargs.get("state_dict")
        self._only = (
            None if given is None else {key.rsplit(f".{PREFIX}", 1)[0].removeprefix("_orig_mod.") for key in given}
        )
        self._basis: SubspaceBasis | None = None
        self._plan: InjectionPlan | None = None
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            # true of this injection only: the layers hold what lasts
            self._only = self._basis = self._plan = None
        _keep_out_of_broadcasts(model, adapter_name)

    def _prepare_adapter_config(self, peft_config: SubspaceConfig, model_config: dict[str, Any]) -> SubspaceConfig:
        self._basis = fill_target_modules(peft_config, self.model)
        return with_default_targets(
            peft_config, lambda: super(SubspaceModel, self)._prepare_adapter_config(peft_config, model_config)
        )

    def _prepare_model(self, peft_config: SubspaceConfig, model: nn.Module) -> None:
        # the last hook before PEFT starts to replace modules: whatever is wrong has to come up here
        keep_unpacked(model)
        targets = target_names(model, peft_config, self._only)
        if targets:
            self._plan = make_plan(model, peft_config, targets, self._basis, narrowed=self._only is not None)
            fill_in(peft_config, self._plan)

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
        put_in(self, self._plan, adapter_name, target, target_name, parent, current_key)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SubspaceConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # a basis that has not come yet is zeros, which would be saved under the hashes of the one to come
        require_loaded(model, adapter_name)
        # PEFT takes the tensors before it saves the configuration, in all ways in which it saves
        adapter, state = adapter_name, by_layer_names(model, state_dict)
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state, *args, **kwargs)
        if config.save_basis or config.basis_modules is not None:
            # perhaps asked for after the adapter was made, or by another configuration than it was made from
            add_basis(model, adapter, tensors)
        config.taken_basis = carried_in(model, adapter, tensors, config)
        return tensors

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # a task is saved under the names that the model has by itself, modules that are trained whole among them
        return unwrapped_name(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SubspaceConfig, adapter_name: str, state_dict: dict[str, Any]
    ) -> Any:
        state = under_model_names(model, config, adapter_name, rename_keys(model, state_dict))
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state)

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

        Own directions (`extra_rank`) belong to one task each, and adapters may have different numbers of them. They
        are put side by side with their weights, so the sum is exact; the new adapter has as many per module as the
        others together. ``svd`` cuts them and the core to the best rank together. The pruning kinds work on entries
        that tasks share, and leave own directions whole, with a warning.

        Args:
            adapters: names of loaded adapters.
            weights: a weight for each.
            adapter_name: a new name.
            combination_type: as above.
            svd_rank: by default the largest k of the adapters, with its own directions.
            density: share of a core's parameters that the pruning kinds keep.
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


def fill_in(config: SubspaceConfig, plan: InjectionPlan) -> None:
    """Fill in the fields of `config` that are declared to be filled in when the adapter is made.

    The first training in a basis leaves it with a record of the base weights, too.
    """
    if plan.first is not None and plan.basis is not None:
        take_record(plan.basis, plan.first)
    for name, value in plan.filled_in.items():
        setattr(config, name, value)


def with_default_targets(config: SubspaceConfig, prepare: Callable[[], Any]) -> Any:
    """Let PEFT prepare the configuration, and note the targets that it fills in for the model's kind."""
    fills = config.target_modules is None and not config.loaded
    prepared = prepare()
    if fills:
        config.filled_targets = config.target_modules
    return prepared


def put_in(
    tuner: BaseTuner,
    plan: InjectionPlan,
    adapter_name: str,
    target: nn.Module,
    target_name: str,
    parent: nn.Module,
    key: str,
) -> None:
    """Make the adapter's layer around `target`, or add the adapter to the layer that `target` is.

    Args:
        tuner: `SubspaceModel`, or PEFT's mixed model.
        plan: the adapter's.
        adapter_name: its name.
        target: the module to adapt.
        target_name: its name in `parent`.
        parent: the module that holds it.
        key: its full name in the base model.
    """
    if plan.config.filled_targets is not None:
        # PEFT shortens long lists
        plan.config.filled_targets = plan.config.target_modules
    inference_mode = plan.config.inference_mode
    if isinstance(target, SubspaceLayer):
        target.update_layer(adapter_name, plan, key, inference_mode=inference_mode)
        if adapter_name not in tuner.active_adapters:
            target.subspace_coef[adapter_name].requires_grad_(False)
        return
    layer = make_layer(target, adapter_name, plan, key, **get_quantization_kwargs(tuner.model))
    if adapter_name not in tuner.active_adapters:
        layer.requires_grad_(False)
    tuner._replace_module(parent, target_name, layer, target)


def _keep_out_of_broadcasts(model: nn.Module, adapter_name: str) -> None:
    """Tell `DistributedDataParallel` not to broadcast the frozen basis at every forward pass, as it does with buffers.

    Every process has loaded the same basis, by fingerprint.
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
