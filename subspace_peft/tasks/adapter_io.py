"""Save and load adapters of models that PEFT does not wrap, such as diffusers' UNets and transformers."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from .._adapted import active_adapter, unwrapped
from ..basis import SubspaceBasis
from ..errors import SubspaceError
from ..tuner.adapter_names import check_adapter_name
from ..tuner.card import base_facts, noted
from ..tuner.config import SubspaceConfig
from ..tuner.task_file import weights_of
from .arguments import check_hub
from .pipeline_task import part_of_folder_for, parts_of_folder
from .write import PREFIX, write_task


def save_adapter(
    model: nn.Module, folder: str | Path, adapter_name: str | None = None, *, overwrite: bool = False
) -> Path:
    """Write an adapter that was injected into `model`, as by diffusers' `add_adapter`, as a stock PEFT adapter folder.

    `load_adapter` reads it, and so do `PeftModel.from_pretrained`, `export_lora` and the command line.

    Args:
        model: The model that holds the adapter.
        folder: The folder to write, made where it does not exist.
        adapter_name: The first active adapter by default; where the model does not know which is active, "default",
            or the first by name.
        overwrite: See `write_task`.

    Returns:
        The folder.

    Raises:
        SubspaceError: The model has no such adapter, or it is of another method; and see `write_task`.
    """
    model = unwrapped(model)
    known = getattr(model, "peft_config", None) or {}
    name = _active(model, known) if adapter_name is None and known else adapter_name
    config = known.get(name)
    if not isinstance(config, SubspaceConfig):
        kind = "no adapter" if config is None else f"a {config.peft_type} adapter, not a SUBSPACE one,"
        raise SubspaceError(
            f"{type(model).__name__} has {kind} named {name!r}; its adapters are"
            f" {', '.join(sorted(known)) or '(none)'}. Add it by `model.add_adapter(SubspaceConfig(…), name)` first."
        )
    if not config.base_model_name_or_path:
        config.base_model_name_or_path = _base_name(model)
    if not config.base_model_name_or_path:
        warnings.warn(
            f"{folder}: the task does not say which base model it is for, as {type(model).__name__} has no name. Set"
            f" model.peft_config[{name!r}].base_model_name_or_path to its Hub id or folder, and save it again.",
            stacklevel=2,
        )
    config.card = noted(config.card, base={**base_facts(model, config), "injected": True})
    return write_task(folder, config, get_peft_model_state_dict(model, adapter_name=name), overwrite=overwrite)


def load_adapter(
    model: nn.Module,
    task: str | Path,
    adapter_name: str = "default",
    *,
    basis: SubspaceBasis | str | None = None,
    **hub: Any,
) -> None:
    """Inject a saved task into `model` itself, in place and active, where the model has no loader for it.

    diffusers' `load_lora_adapter` reads LoRA only. Once the task is injected, `set_adapters`, `fuse_lora` and the rest
    of diffusers' calls work on it.

    Args:
        model: A diffusers model, or any other module. The coefficients can be trained; everything else is frozen.
        task: Folder or Hub id of a saved task. Of a pipeline's task the part that fits the model is taken.
        adapter_name: A name that no adapter of the model has.
        basis: The basis, its folder or its Hub id; by default the place that the task's config names.
        **hub: `revision`, `token`, `cache_dir` and `subfolder` of a task on the Hub.

    Raises:
        SubspaceError: The model is a PeftModel, the name is taken, or the folder holds no subspace task; also the
            errors of `SubspaceConfig.from_pretrained` and of the injection, before the model is touched.
    """
    check_hub(str(task), hub)
    model = unwrapped(model)
    if isinstance(model, PeftModel):
        raise SubspaceError(f"A PeftModel loads by itself: model.load_adapter({str(task)!r}, {adapter_name!r}).")
    if adapter_name in (getattr(model, "peft_config", None) or {}):
        raise SubspaceError(
            f"The model has an adapter {adapter_name!r} already: choose another name, or delete it first."
        )
    parts = [] if hub.get("subfolder") else parts_of_folder(task)
    if parts:
        hub = {**hub, "subfolder": part_of_folder_for(model, task, parts, basis)}
    try:
        config = SubspaceConfig.from_pretrained(str(task), **({} if basis is None else {"basis": basis}), **hub)
    except SubspaceError:
        raise
    except ValueError as error:
        raise SubspaceError(f"{task}: {error}. Pass the folder or Hub id of a saved task.") from error
    if not isinstance(config, SubspaceConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise SubspaceError(
            f"{task}: its peft_type is {kind}, not SUBSPACE. A LoRA is loaded by the model's own"
            " load_lora_adapter, or projected into a basis by `project_lora` first."
        )
    # transformers takes an empty name for "default"
    check_adapter_name(adapter_name, {**(getattr(model, "peft_config", None) or {}), adapter_name: config})
    file = weights_of(task, config.loaded_from.folder)
    state = {key.removeprefix(PREFIX): value for key, value in load_file(file).items()}
    config.inference_mode = False
    add = getattr(model, "add_adapter", None)
    if add is not None:
        add(config, adapter_name)
    else:
        inject_adapter_in_model(config, model, adapter_name)
    unused = set_peft_model_state_dict(model, state, adapter_name=adapter_name).unexpected_keys
    if unused:
        raise SubspaceError(
            f"{task}: {type(model).__name__} has no place for {', '.join(sorted(unused)[:3])}. Modules that are"
            " trained whole (modules_to_save) can only be loaded by `PeftModel.from_pretrained`."
        )


def _base_name(model: nn.Module) -> str | None:
    """Return the Hub id or folder that a transformers or diffusers model was loaded from; None where it has none."""
    settings = getattr(model, "config", None)
    known = (
        settings.get("_name_or_path") if isinstance(settings, Mapping) else getattr(settings, "_name_or_path", None)
    )
    found = known or getattr(model, "name_or_path", None)
    return found if isinstance(found, str) and found else None


def _active(model: nn.Module, known: Mapping[str, Any]) -> str:
    """Return the active adapter's name; where the model cannot tell, "default", or the first by name."""
    if hasattr(model, "active_adapters"):
        # transformers' models know of the adapters that their own `add_adapter` made, and no others
        with contextlib.suppress(ValueError):
            return active_adapter(model)
    return "default" if "default" in known else min(known)
