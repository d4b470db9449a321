"""Questions to an adapted model that PEFT and transformers answer differently."""

from __future__ import annotations

from typing import Any

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
# wrappers that call the model `module`, of packages that need not be installed
_BY_NAME = ("DeepSpeedEngine", "FullyShardedDataParallel")


def active_adapter(model: Any) -> str:
    """Return the (first) active adapter of a PeftModel, or of a model adapted by transformers' own `add_adapter`."""
    active = model.active_adapters
    names = active() if callable(active) else active
    return names if isinstance(names, str) else str(names[0])


def unwrapped(model: Any) -> Any:
    """Return the model inside torch.compile, DDP, DataParallel, FSDP, Fabric or DeepSpeed; anything else as it is."""
    from torch import nn
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    while isinstance(model, nn.Module):
        inner = next((model._modules[name] for name in _WRAPPERS if name in model._modules), None)
        if inner is None and (
            isinstance(model, (DataParallel, DistributedDataParallel)) or type(model).__name__ in _BY_NAME
        ):
            inner = model._modules.get("module")
        if inner is None:
            break
        model = inner
    return model
