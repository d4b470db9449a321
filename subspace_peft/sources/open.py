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
from ..basis.module_names import PREFIX, has_peft_prefix, plain_name, plain_names
from ..cards.readme import front_matter
from ..errors import SourceError
from .converted import convert
from .diffusers_kohya import has_alphas, has_foreign_keys, has_original_layout, metadata_configs, read_foreign_keys
from .floats import upcast
from .live_model import read_live
from .locate import PICKLED, SourceFiles, locate, open_tensors
from .lora import config_problem, is_embedding, is_saved_module, method_of, scaling, sort_keys
from .other_formats import format_of_keys
from .pipeline import is_pipeline
from .plain_lora import config_problems, method_problem, needs_conversion, tensor_problems
from .source import IN_MEMORY, Source
from .spans import read_spans
from .task_source import is_saved_task, is_task, task_source


def open_source(
    reference: Any, *, token: str | bool | None = None, allow_bin: bool = False, base_model: nn.Module | None = None
) -> Source:
    """Open a source adapter.

    Args:
        reference: the folder of a PEFT LoRA, or of a task in a basis; a LoRA file of diffusers or kohya; a Hub id,
            ``org/name[@revision][:folder or file inside]``; a LoRA state dict, alone (its scale then counts as 1) or
            as ``(state_dict, LoraConfig or dict)``; a live PeftModel (its active adapter); or a `SavedTask`.
        token: as in huggingface_hub.
        allow_bin: take pickled weights too, read with ``weights_only=True``.
        base_model: the model that the adapter adapts: needed for DoRA, KaSA, BD-LoRA, PiSSA, OLoRA and adapters of
            PEFT's other methods, which are then converted to LoRA factors, and for kohya files whose modules' names
            cannot be told otherwise. It is left as it was.

    Raises:
        SourceError: it is none of these, or it cannot be read; names the fault and the remedy.
    """
    if isinstance(reference, Source):
        return reference
    reference = unwrapped(reference)
    if is_task(reference):
        return _from_task(reference)
    if isinstance(reference, (str, Path)):
        return _from_files(locate(str(reference), token=token, allow_bin=allow_bin), base_model)
    if isinstance(reference, tuple) and len(reference) == 2 and isinstance(reference[0], Mapping):
        return _from_state_dict(dict(reference[0]), _as_dict(reference[1]), IN_MEMORY, base_model)
    if isinstance(reference, Mapping):
        return _from_state_dict(dict(reference), {}, IN_MEMORY, base_model)
    if hasattr(reference, "peft_config"):
        return _from_model(reference, base_model)
    raise SourceError(
        "A source adapter is a LoRA folder or file, a task's folder, a Hub id, a state dict, (state_dict, config), or"
        f" a PeftModel; got {type(reference).__name__}."
    )


def is_one_source(reference: Any) -> bool:
    """Return whether `reference` is one source adapter, where a list of them is expected."""
    reference = unwrapped(reference)
    pair = isinstance(reference, tuple) and len(reference) == 2 and isinstance(reference[0], Mapping)
    one = isinstance(reference, (str, Path, Mapping, Source)) or is_saved_task(reference)
    return pair or one or hasattr(reference, "peft_config")


def _from_task(task: Any) -> Source:
    # one out of a bundle has a name there
    name = (task.config.bundle or {}).get("task") or "task" if is_saved_task(task) else active_adapter(task)
    return task_source(task, IN_MEMORY, name)


def _from_model(model: Any, base_model: nn.Module | None) -> Source:
    live = read_live(model, IN_MEMORY)
    config = _as_dict(live.config)
    # a live model says whether what it calls `module` is a wrapper's
    outermost = hasattr(model, "get_base_model") and unwrapped(model.get_base_model()) is not model.get_base_model()
    source = _from_state_dict(live.tensors, config, IN_MEMORY, base_model, outermost=outermost, problems=live.problems)
    source.name = live.name
    if source.converted is None:
        paths = plain_names(live.scalings, outermost=outermost)
        source.scales = _live_scales(source, {paths[path]: scale for path, scale in live.scalings.items()})
        source.scale_from = "of the live layers, which were rescaled"
    return source


def _live_scales(source: Source, scalings: Mapping[str, float]) -> dict[str, float]:
    """Return each module's live scale, where any of them is another one than the configuration's."""
    live = {module: scalings[module] for module in source.keys if module in scalings}
    for module, scale in live.items():
        try:
            if abs(scaling(source.config, module, source.shape(module)[2]) - scale) > 1e-9 * abs(scale):
                return live
        except ValueError:
            return live
    return {}


def _from_state_dict(
    tensors: dict[str, torch.Tensor],
    config: dict[str, Any],
    location: str,
    base_model: nn.Module | None = None,
    *,
    outermost: bool = True,
    problems: Iterable[str] = (),
) -> Source:
    _check_tensors(tensors, location)
    plain = plain_names(tensors, outermost=outermost)
    more: dict[str, Any] = {"other_keys": _others(tensors), "plain_keys": plain}
    if base_model is not None and (kind := _to_convert(config)):
        keys, tensors, more = _converted(config, kind, plain, tensors.__getitem__, base_model, location)
    elif _is_foreign(plain, config) and not list(problems):
        keys, more = _foreign(tensors, tensors.__getitem__, {}, config, location, base_model)
    else:
        keys = _keys(plain, config, location, problems)
        more["pipeline"] = is_pipeline(keys)
    digest = hashlib.sha256()
    for key in sorted(key for sides in keys.values() for key in sides.values()):
        value = tensors[key]
        digest.update(f"{key}:{value.dtype}:{list(value.shape)};".encode())
        digest.update(tensor_bytes(value))
    return Source(
        "adapter",
        location,
        config,
        keys,
        upcast(tensors.__getitem__),
        digest.hexdigest(),
        **more,
    )


def _is_foreign(plain: Mapping[str, str], config: Mapping[str, Any]) -> bool:
    """Return whether a state dict is to be read as a file of diffusers or kohya."""
    short = plain.values()
    return has_foreign_keys(plain) or (not config and (has_alphas(short) or has_original_layout(short)))


def _check_tensors(tensors: Mapping[Any, Any], location: str) -> None:
    """Raise `SourceError` where a state dict holds something else than tensors under their names."""
    for key, value in tensors.items():
        if isinstance(key, str) and isinstance(value, torch.Tensor):
            if value.is_meta and ".lora_" in key:
                raise SourceError(
                    f"{location}: {key} is on the meta device and has no values: the model is not loaded yet, or"
                    " accelerate keeps them elsewhere. Load the adapter whole, or name its folder."
                )
            continue
        if isinstance(value, Mapping) and all(isinstance(each, torch.Tensor) for each in value.values()):
            form = format_of_keys(map(str, value))
            raise SourceError(
                f"{location}: its tensors are in a dict of their own, {key!r}"
                + (f"; it is {form}." if form else ". Pass that one alone.")
            )
        raise SourceError(
            f"{location}: {key!r} is a {type(value).__name__}, and a state dict holds torch tensors under their names."
            " Turn arrays into tensors with torch.from_numpy, and leave out what is none."
        )


def _from_files(files: SourceFiles, base_model: nn.Module | None) -> Source:
    if files.config is not None and method_of(files.config) == "SUBSPACE" and files.weights.suffix not in PICKLED:
        folder = files.weights.parent
        more = {"revision": files.revision, "folder": folder, "file": files.weights, "license": _license(folder)}
        return task_source(folder, files.location, files.name, **more)
    names, read, metadata = open_tensors(files.weights, files.location)
    if files.config is not None and base_model is not None and (kind := _to_convert(files.config)):
        keys, tensors, more = _converted(files.config, kind, plain_names(names), read, base_model, files.location)
        return _of_files(files, keys, tensors.__getitem__, **more)
    read = upcast(read)
    if files.config is not None and not has_foreign_keys(names):
        plain = plain_names(names)
        keys = _keys(plain, files.config, files.location, alone=True)
        more = {"other_keys": _others(names), "plain_keys": plain, "pipeline": is_pipeline(keys, metadata)}
        return _of_files(files, keys, read, in_file=_is_read_by_bytes(files.weights, keys), **more)
    keys, more = _foreign(names, read, metadata, files.config or {}, files.location, base_model)
    return _of_files(files, keys, read, in_file=_is_read_by_bytes(files.weights, keys), **more)


def _foreign(
    names: Iterable[str],
    read: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str],
    config: Mapping[str, Any],
    location: str,
    base_model: nn.Module | None,
) -> tuple[dict[str, dict[str, str]], dict[str, Any]]:
    """Return the keys of an adapter of diffusers or kohya, or of a PEFT file alone, and what else its `Source` has."""
    names = list(names)
    if form := format_of_keys(names):
        raise SourceError(f"{location}: it is {form}.")
    bases = [] if base_model is None else [plain_name(name) for name, _ in base_model.named_modules()]
    found = read_foreign_keys(names, read, metadata, bases)
    for each in (config, *metadata_configs(metadata)):
        found.problems += config_problems(each, offered=False)
    factors = [f"{module}.lora_A.weight" for module in found.keys]
    plain = plain_names(names)
    found.problems += tensor_problems(
        {each: each for each in factors} | {each: plain[each] for each in found.others}, config
    )
    if found.problems:
        raise SourceError(f"{location}: " + "; ".join(dict.fromkeys(found.problems[:5])) + ".")
    if not found.keys:
        raise SourceError(f"{location}: it holds no LoRA tensors. It is no LoRA, or it was saved empty.")
    return found.keys, {
        "other_keys": _others(found.others),
        "scales": found.scales,
        "plain_keys": plain,
        "pipeline": is_pipeline(found.keys, metadata),
    }


def _is_read_by_bytes(file: Path, keys: Mapping[str, Mapping[str, str]]) -> bool:
    """Return whether a file's byte ranges are the factors: not of a pickle, nor of floats of eight bits."""
    if file.suffix in PICKLED:
        return False
    spans = read_spans(file)
    return all(spans[key].dtype is not None for sides in keys.values() for key in sides.values())


def _to_convert(config: Mapping[str, Any]) -> str | None:
    """Return what an adapter has to be converted from on its base model, None where it is a LoRA or a task."""
    kind = method_of(config)
    return needs_conversion(config) if kind == "LORA" else None if kind == "SUBSPACE" else kind


def _converted(
    config: dict[str, Any],
    kind: str,
    plain: Mapping[str, str],
    read: Callable[[str], torch.Tensor],
    base_model: nn.Module,
    location: str,
) -> tuple[dict[str, dict[str, str]], dict[str, torch.Tensor], dict[str, Any]]:
    """Return a converted adapter's keys and tensors, and what else its `Source` has."""
    if method_of(config) == "LORA" and (problems := tensor_problems(plain, config, converting=True)):
        raise SourceError(f"{location}: " + "; ".join(problems[:5]) + ".")
    # what a method shares among its layers, such as VeRA's projections, is no module's
    shared = {name for name in plain if name.startswith("base_model.") and not has_peft_prefix(name)}
    state = {name if name in shared else f"{PREFIX}{short}": read(name) for name, short in plain.items()}
    factors, lost = convert(config, state, base_model, location)
    keys = sort_keys(factors)[0]
    saved = tuple(name for name in state if is_saved_module(name, config) or is_embedding(name))
    tensors = factors | {name: state[name] for name in saved}
    # the scale is folded into the factors
    scales = dict.fromkeys(keys, 1.0)
    return keys, tensors, {"other_keys": saved, "scales": scales, "lost": lost, "converted": kind}


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


def _keys(
    plain: Mapping[str, str],
    config: dict[str, Any],
    location: str,
    further: Iterable[str] = (),
    *,
    alone: bool = False,
) -> dict[str, dict[str, str]]:
    """Return ``{module: {"A": key, "B": key}}`` of a PEFT LoRA.

    Args:
        plain: each of its keys, and the key without the names of wrappers.
        config: its configuration.
        location: named in errors.
        further: problems that are known already.
        alone: whether the keys are a saved adapter's, with nothing of the base model among them.

    Raises:
        SourceError: the adapter is none, or its update is no low-rank one; lists up to five problems.
    """
    kind = method_of(config)
    if kind == "SUBSPACE":
        raise SourceError(
            f"{location}: the adapter's peft_type is SUBSPACE, not LORA: a task in a basis. Give its folder, which"
            " has its basis on record, or the model that it is loaded in."
        )
    if kind != "LORA":
        raise SourceError(f"{location}: {method_problem(kind)}")
    if form := format_of_keys(plain.values()):
        raise SourceError(f"{location}: it is {form}.")
    keys, problems = sort_keys(plain, plain)
    if problem := config_problem(config):
        problems.append(problem)
    # what the configuration says is not said again of the layers and tensors that go with it
    problems += config_problems(config) or list(further) or tensor_problems(plain, config, alone=alone)
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
