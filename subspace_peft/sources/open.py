"""Open one source adapter, whatever form it is given in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._adapted import active_adapter, unwrapped
from ..basis.module import tensor_bytes
from ..basis.module_names import plain_names
from ..cards.readme import front_matter
from ..errors import SourceError
from .converted import convert
from .diffusers_kohya import has_foreign_keys, read_foreign_keys
from .locate import PICKLED, SourceFiles, locate, open_tensors
from .lora import config_problem, is_saved_module, method_of, sort_keys
from .pipeline import is_pipeline
from .source import IN_MEMORY, Source

# these starts take their factors out of the base weights: the saved update means nothing on the base model itself
MUTATING_STARTS = ("pissa", "olora", "corda", "lora_ga", "loftq")


def open_source(
    reference: Any, *, token: str | bool | None = None, allow_bin: bool = False, base_model: nn.Module | None = None
) -> Source:
    """Open a source adapter.

    Args:
        reference: the folder of a PEFT LoRA; a LoRA file of diffusers or kohya; a Hub id,
            ``org/name[@revision][:folder or file inside]``; a LoRA state dict, alone (its scale then counts as 1) or
            as ``(state_dict, LoraConfig or dict)``; or a live PeftModel (its active adapter).
        token: as in huggingface_hub.
        allow_bin: take pickled weights too, read with ``weights_only=True``.
        base_model: the model that the adapter adapts: needed for adapters of PEFT's other methods, which
            `convert_to_lora` then turns into LoRA factors, and for kohya files whose modules' names cannot be told
            otherwise. It is left as it was.

    Raises:
        SourceError: it is none of these, or it cannot be read; names the fault and the remedy.
    """
    if isinstance(reference, Source):
        return reference
    reference = unwrapped(reference)
    if isinstance(reference, (str, Path)):
        return _from_files(locate(str(reference), token=token, allow_bin=allow_bin), base_model)
    if isinstance(reference, tuple) and len(reference) == 2 and isinstance(reference[0], Mapping):
        return _from_state_dict(dict(reference[0]), _as_dict(reference[1]), IN_MEMORY)
    if isinstance(reference, Mapping):
        return _from_state_dict(dict(reference), {}, IN_MEMORY)
    if hasattr(reference, "peft_config"):
        return _from_model(reference)
    raise SourceError(
        "A source adapter is a LoRA folder or file, a Hub id, a state dict, (state_dict, config), or a PeftModel; got"
        f" {type(reference).__name__}."
    )


def is_one_source(reference: Any) -> bool:
    """Return whether `reference` is one source adapter, where a list of them is expected."""
    reference = unwrapped(reference)
    pair = isinstance(reference, tuple) and len(reference) == 2 and isinstance(reference[0], Mapping)
    return pair or isinstance(reference, (str, Path, Mapping, Source)) or hasattr(reference, "peft_config")


def _from_model(model: Any) -> Source:
    from peft import get_peft_model_state_dict

    adapter = active_adapter(model)
    config = _as_dict(model.peft_config[adapter])
    # a live model says whether what it calls `module` is a wrapper's
    outermost = hasattr(model, "get_base_model") and unwrapped(model.get_base_model()) is not model.get_base_model()
    state = get_peft_model_state_dict(model, adapter_name=adapter)
    source = _from_state_dict(state, config, IN_MEMORY, outermost=outermost)
    source.name = adapter
    return source


def _from_state_dict(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], location: str, *, outermost: bool = True
) -> Source:
    plain = plain_names(tensors, outermost=outermost)
    keys = _keys(plain, config, location)
    digest = hashlib.sha256()
    for key in sorted(key for sides in keys.values() for key in sides.values()):
        value = tensors[key]
        digest.update(f"{key}:{value.dtype}:{list(value.shape)};".encode())
        digest.update(tensor_bytes(value))
    others = _others(tensors)
    return Source(
        "adapter",
        location,
        config,
        keys,
        tensors.__getitem__,
        digest.hexdigest(),
        other_keys=others,
        plain_keys=plain,
        pipeline=is_pipeline(keys),
    )


def _from_files(files: SourceFiles, base_model: nn.Module | None) -> Source:
    names, read, metadata = open_tensors(files.weights, files.location)
    if files.config is not None and method_of(files.config) not in ("LORA", "SUBSPACE") and base_model is not None:
        return _from_other_method(files, files.config, {name: read(name) for name in names}, base_model)
    in_file = files.weights.suffix not in PICKLED
    if files.config is not None and not has_foreign_keys(names):
        plain = plain_names(names)
        keys = _keys(plain, files.config, files.location)
        return _of_files(files, keys, read, in_file=in_file, other_keys=_others(names), plain_keys=plain)
    bases = [] if base_model is None else [name for name, _ in base_model.named_modules()]
    found = read_foreign_keys(names, read, metadata, bases)
    if found.problems:
        raise SourceError(f"{files.location}: " + "; ".join(found.problems[:5]) + ".")
    if not found.keys:
        raise SourceError(
            f"{files.location}: {files.weights.name} holds no LoRA tensors. It is no LoRA, or it was saved empty."
        )
    return _of_files(
        files,
        found.keys,
        read,
        in_file=in_file,
        other_keys=found.others,
        scales=found.scales,
        plain_keys=plain_names(names),
        pipeline=is_pipeline(found.keys, metadata),
    )


def _from_other_method(
    files: SourceFiles, config: dict[str, Any], state: dict[str, torch.Tensor], base_model: nn.Module
) -> Source:
    factors, lost = convert(config, state, base_model, files.location)
    keys = sort_keys(factors)[0]
    saved = tuple(name for name in state if is_saved_module(name, config))
    tensors = factors | {name: state[name] for name in saved}
    # the scale is folded into the factors
    scales = dict.fromkeys(keys, 1.0)
    return _of_files(files, keys, tensors.__getitem__, other_keys=saved, scales=scales, lost=lost)


def _of_files(
    files: SourceFiles, keys: dict[str, dict[str, str]], read: Callable[[str], torch.Tensor], **more: Any
) -> Source:
    return Source(
        files.name,
        files.location,
        files.config or {},
        keys,
        read,
        digest="",  # hashed when the file is read for other reasons anyway, or when its sha256 is asked for
        revision=files.revision,
        folder=files.weights.parent,
        file=files.weights,
        license=_license(files.weights.parent),
        **more,
    )


def _license(folder: Path) -> str | None:
    said = front_matter(folder / "README.md")
    # "other" stands for a licence that is named beside it
    named = said.get("license_name") if said.get("license") == "other" else None
    found = named or said.get("license")
    return ", ".join(map(str, found)) if isinstance(found, list) else None if found is None else str(found)


def _keys(plain: Mapping[str, str], config: dict[str, Any], location: str) -> dict[str, dict[str, str]]:
    """Return ``{module: {"A": key, "B": key}}`` of a PEFT LoRA.

    Args:
        plain: each of its keys, and the key without the names of wrappers.
        config: its configuration.
        location: named in errors.

    Raises:
        SourceError: the adapter is none, or its update is no low-rank one; lists up to five problems.
    """
    kind = method_of(config)
    if kind == "SUBSPACE":
        raise SourceError(
            f"{location}: the adapter's peft_type is SUBSPACE, not LORA: a task in a basis. Export it with"
            " `subspace-peft export-lora`."
        )
    if kind != "LORA":
        raise SourceError(
            f"{location}: the adapter's peft_type is {kind}, not LORA. Pass its base model, base_model="
            " (--base-model), and it is converted, or convert it with PEFT's `save_as_lora` first."
        )
    keys, problems = sort_keys(plain, plain)
    if problem := config_problem(config):
        problems.append(problem)
    if config.get("use_dora"):
        problems.append("it was trained with use_dora=True, which is no low-rank update; train it without")
    start = str(config.get("init_lora_weights") or "")
    if start.startswith(MUTATING_STARTS):
        problems.append(
            f"it was trained with init_lora_weights={start!r}, which changes the base weights, so its update does not"
            " belong to the base model: save it with PEFT's path_initial_model_for_weight_conversion, which makes a"
            " plain LoRA of it"
        )
    if problems:
        raise SourceError(f"{location}: " + "; ".join(problems[:5]) + ".")
    if not keys:
        raise SourceError(f"{location}: no lora_A/lora_B tensors inside. It is no LoRA, or it was saved empty.")
    return keys


def _others(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(name for name in names if ".lora_" not in name))


def _as_dict(config: Any) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    if hasattr(config, "to_dict"):
        return config.to_dict()
    if is_dataclass(config) and not isinstance(config, type):
        return asdict(config)
    raise SourceError(f"An adapter's config is a LoraConfig or a dict, got {type(config).__name__}.")
