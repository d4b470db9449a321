"""Take a LoRA out of a live model: its tensors, and what its layers do with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .._io.warn import warn_caller
from ..errors import SourceError

# PEFT's variants that compute s·B·A: they differ in how they train
PLAIN_VARIANTS = ("VeloraLinearVariant", "MontecloraLinearVariant", "MiCALinearVariant", "MiCAEmbeddingVariant")


@dataclass
class LiveLora:
    """One adapter of a live model.

    Attributes:
        name: the adapter's.
        config: its configuration as the model has it.
        tensors: its tensors, as PEFT saves them.
        scalings: the beginning of a layer's keys, up to ``.lora_``, → the scale that the layer multiplies by now;
            `set_scale`, `scale_layer` and PEFT's contexts change it.
        problems: layers whose function is not s·B·A; each names the layer.
    """

    name: str
    config: Any
    tensors: dict[str, torch.Tensor]
    scalings: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_live(model: Any, location: str) -> LiveLora:
    """Read the active adapter of a PeftModel, or of a model adapted by transformers' or diffusers' `add_adapter`.

    Args:
        model: the model.
        location: named in errors.

    Raises:
        SourceError: several adapters are active, or none is.
    """
    from peft import get_peft_model_state_dict

    active = model.active_adapters() if callable(model.active_adapters) else model.active_adapters
    names = [active] if isinstance(active, str) else list(active)
    if len(names) != 1:
        raise SourceError(
            f"{location}: {len(names)} adapters of the model are active ({', '.join(map(str, names)) or 'none'}), and"
            " a source is one. Choose it with model.set_adapter(name)."
        )
    name = str(names[0])
    config = model.peft_config[name]
    if getattr(config, "is_prompt_learning", False):
        return LiveLora(name, config, {})
    found = LiveLora(name, config, get_peft_model_state_dict(model, adapter_name=name))
    disabled = False
    for path, layer in model.named_modules():
        scaling = getattr(layer, "scaling", None)
        if not isinstance(scaling, dict) or name not in scaling or not hasattr(layer, "lora_A"):
            continue
        found.scalings[path] = float(scaling[name])
        disabled |= bool(getattr(layer, "_disable_adapters", False))
        variant = getattr(layer, "lora_variant", {}).get(name)
        kind = type(layer)
        if variant is not None and type(variant).__name__ not in PLAIN_VARIANTS:
            found.problems.append(f"{path}: PEFT's {type(variant).__name__} computes something else than s·B·A")
        elif kind.__name__ in ("ParamWrapper", "MultiheadAttention"):
            found.problems.append(
                f"{path}: it adapts {'a parameter' if kind.__name__ == 'ParamWrapper' else 'an nn.MultiheadAttention'}"
                " (PEFT's lora." + kind.__name__ + "), and a basis is of modules that are matrices. Leave it out of"
                " the adapter's targets"
            )
        elif not kind.__module__.startswith("peft."):
            found.problems.append(f"{path}: {kind.__module__}.{kind.__name__} is no layer of PEFT's own LoRA")
    if disabled:
        warn_caller(
            f"{location}: adapters are disabled in the model; {name!r} is read as it acts when they are enabled."
        )
    return found
