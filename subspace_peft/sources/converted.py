"""Turn adapters of PEFT's other methods into LoRA factors, by PEFT's own `convert_to_lora`."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import SourceError
from .lora import is_embedding, is_saved_module, method_of
from .merged_updates import keep_weights, merged_factors, put_back
from .plain_lora import NO_UPDATE, config_problems, method_problem, moves_weights

ENERGY = 0.9999  # share of each update's energy that the conversion has to keep
PREFIX = "base_model.model."
_alone = threading.RLock()


def convert(
    config: Mapping[str, Any], state: Mapping[str, torch.Tensor], base_model: nn.Module, location: str
) -> tuple[dict[str, torch.Tensor], float]:
    """Return an adapter's update as LoRA factors, scale folded in.

    The adapter is put on `base_model`, which is left as it was. Updates of variants of LoRA, of AdaLoRA and MiSS are
    taken from the weights that PEFT merges them into, those of other methods from PEFT's `convert_to_lora`.

    Args:
        config: its adapter_config.json.
        state: its saved tensors, under PEFT's keys.
        base_model: the model that it adapts, with or without its task head.
        location: named in errors.

    Returns:
        ``{module.lora_A.weight, module.lora_B.weight}``; and the share of the update's energy that was lost.

    Raises:
        SourceError: PEFT cannot load or convert it; gives the reason.
    """
    # the base model is changed meanwhile, and what warnings are shown is the whole process's
    with _alone:
        return _convert(config, state, base_model, location)


def _convert(
    config: Mapping[str, Any], state: Mapping[str, torch.Tensor], base_model: nn.Module, location: str
) -> tuple[dict[str, torch.Tensor], float]:
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.tuners.lora.conversion import convert_to_lora

    kind = method_of(config)
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise SourceError(f"{location}: the installed PEFT knows no method {kind}. Upgrade it, or leave this one out.")
    if kind in NO_UPDATE:
        raise SourceError(f"{location}: {method_problem(kind)}")
    _require_bare(base_model, location)
    by_weights = kind in ("LORA", "ADALORA", "MISS")
    problems = config_problems(config, converting=True) if kind == "LORA" else []
    if (config.get("bias") or "none") != "none":
        problems.append(f"it was trained with bias={config['bias']!r}, and a LoRA holds no biases; train it without")
    if problems:
        raise SourceError(f"{location}: " + "; ".join(problems) + ".")
    given = {key: value for key, value in config.items() if key not in ("auto_mapping", "peft_version")}
    # a head is none of the update, and its class may be another one here
    given |= {"modules_to_save": None, "inference_mode": True, "task_type": None}
    wanted = {key: value for key, value in state.items() if not is_saved_module(key, config) and not is_embedding(key)}
    _require_own_embeddings(state, base_model, location)
    trained = {name: parameter.requires_grad for name, parameter in base_model.named_parameters()}
    # before anything is put on the model, since a start may change its weights
    kept = keep_weights(base_model, wanted) if kind == "LORA" and moves_weights(config) else {}
    model = None
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model = PeftModel(
                base_model,
                PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_peft_type(**given),
                autocast_adapter_dtype=by_weights,
            )
            wanted = _under_names_of(model, base_model, wanted)
            set_peft_model_state_dict(model, dict(wanted))
            _require_loaded(
                wanted, get_peft_model_state_dict(model, save_embedding_layers=False), base_model, location
            )
            if by_weights:
                return merged_factors(model, kept, ENERGY, location)
            factors = convert_to_lora(model, rank=ENERGY)[1]
        factors = {key.removeprefix(PREFIX): value for key, value in factors.items() if ".lora_" in key}
        return factors, _lost(model, factors)
    except SourceError:
        raise
    except Exception as error:  # PEFT's methods raise whatever they raise
        possible = "not support LoRA conversion" not in str(error)
        raise SourceError(
            f"{location}: PEFT could not convert this {kind} adapter on {type(base_model).__name__}"
            f" ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). "
            + (
                "Convert it with PEFT's `save_as_lora` where it was trained, or leave it out."
                if possible
                else "Leave it out."
            )
        ) from error
    finally:
        if model is not None:
            model.unload()
            put_back(base_model, kept)
            for name, parameter in base_model.named_parameters():
                parameter.requires_grad_(trained.get(name, parameter.requires_grad))


def _require_bare(base_model: nn.Module, location: str) -> None:
    # what is put on the model is taken off again, and adapters that were on it before would go as well
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = next((name for name, module in base_model.named_modules() if isinstance(module, BaseTunerLayer)), None)
    if adapted is not None or hasattr(base_model, "peft_config"):
        raise SourceError(
            f"{location}: the base model given is a {type(base_model).__name__} with adapters of its own"
            f"{'' if adapted is None else f' (on {adapted})'}, so that what this one adds to the base model cannot be"
            " told. Pass the base model without adapters, loaded by itself."
        )


def _under_names_of(model: Any, base_model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors under this model's names.

    A task head puts a prefix such as ``bert.`` before its backbone's names.
    """
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    head = f"{PREFIX}{getattr(base_model, 'base_model_prefix', '')}."
    for old, new in ((PREFIX, PREFIX), (head, PREFIX), (PREFIX, head)):
        renamed = {(new + key.removeprefix(old) if key.startswith(old) else key): v for key, v in state.items()}
        if renamed.keys() == own:
            return renamed
    return state


def _require_own_embeddings(state: Mapping[str, torch.Tensor], base_model: nn.Module, location: str) -> None:
    # PEFT saves an adapted embedding whole beside its factors, and a variant's update is of that weight
    own = base_model.state_dict()
    for key, value in state.items():
        if is_embedding(key) and key.endswith(".base_layer.weight"):
            name = key.replace(".base_layer.", ".").rpartition(".")[0].rpartition(".")[2]
            same = [each for each in own if f".{each}".endswith(f".{name}.weight")]
            if not any(own[each].shape == value.shape and torch.equal(own[each].to(value), value) for each in same):
                raise SourceError(
                    f"{location}: {key} is another embedding than the base model's. Pass the base model with the"
                    " embedding that the adapter was trained on, with the same tokens added."
                )


def _require_loaded(
    wanted: Mapping[str, torch.Tensor], loaded: Mapping[str, torch.Tensor], base_model: nn.Module, location: str
) -> None:
    # PEFT only warns of keys that it misses, and leaves what it had drawn at random
    wrong = sorted(wanted.keys() ^ loaded.keys()) or [
        key for key, value in wanted.items() if not torch.equal(value.to(loaded[key]), loaded[key])
    ]
    if wrong:
        raise SourceError(
            f"{location}: {len(wrong)} of the adapter's tensors, such as {wrong[0]}, do not fit the base model given "
            f"({type(base_model).__name__}). Pass the model that it was trained on."
        )


def _lost(model: Any, factors: Mapping[str, torch.Tensor]) -> float:
    """Return the share of ‖ΔW‖², over all modules, that the factors do not hold."""
    from transformers.pytorch_utils import Conv1D

    lost = total = 0.0
    for name, layer in model.named_modules():
        key = name.removeprefix(PREFIX)
        if f"{key}.lora_A.weight" in factors:
            delta = layer.get_delta_weight("default").double()
            delta = delta.T if isinstance(layer.get_base_layer(), Conv1D) else delta
            product = factors[f"{key}.lora_B.weight"].double() @ factors[f"{key}.lora_A.weight"].double()
            lost, total = lost + float((delta - product).square().sum()), total + float(delta.square().sum())
    return lost / total if total else 0.0
