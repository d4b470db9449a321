"""Load one task of a bundle as an adapter of a model, or extract it as a folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.mixed_model import PeftMixedModel
from torch import nn

from .._adapted import unwrapped
from .._io.folder_names import check_folder_names
from .._io.occupied import LORA, TASK
from .._io.progress import progress_bar
from .._io.warn import warn_caller
from ..basis import SubspaceBasis
from ..basis.overwriting import Planned, check_target
from ..basis.pipeline_parts import PARTS
from ..convert.export import export_lora
from ..errors import SubspaceError
from ..tasks.arguments import check_known, keywords_of
from ..tasks.pipeline_task import part_for
from ..tasks.write import core_tensors, fill_folder, own_tensors_of, write_task
from ..tuner.card import MEASURED, digest_of, noted
from ..tuner.config import SubspaceConfig
from .bundle import Bundle, open_bundle, reopen_bundle
from .format import check_name

# what PEFT's `load_adapter` takes without naming it
DISPATCH = ("device_map", "max_memory", "offload_dir", "offload_folder", "offload_index", "ignore_mismatched_sizes")


def load_task(
    model: nn.Module,
    bundle: str | Path | Bundle,
    task: str,
    adapter_name: str | None = None,
    *,
    as_lora: bool | None = None,
    own_directions: bool | None = None,
    basis: SubspaceBasis | str | Path | None = None,
    is_trainable: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    **loading: Any,
) -> PeftModel | PeftMixedModel:
    """Make one task of a bundle an adapter of the model, as `model.load_adapter` does, reading no other task.

    Modules that were trained whole (a classifier) come with it. `model.peft_config[adapter_name]` has `id2label`,
    `bundle` (location, revision, task, sha256) and the basis's fingerprint.

    Args:
        model: A PeftModel, which is changed; or another model, around which one is made.
        bundle: Folder, file or Hub id of a bundle, or an open one.
        task: The task's name in the bundle. Of a pipeline's task, whose parts are tasks ``<task>.unet`` and so on, the
            part that fits the model is taken.
        adapter_name: The adapter's name; by default the task's, with ``_`` for dots, which torch does not allow in the
            name of a module.
        as_lora: Load the task as a stock LoRA (core and own directions in one, exact) instead of a subspace adapter.
        own_directions: Whether directions of the task's own, such as what `compress_fleet` keeps of a LoRA beside the
            basis, come along. False gives the projection of the whole on the basis. None: yes, but not with
            ``as_lora=False``, which left residuals out in earlier versions and warns.
        basis: The basis, its folder or its Hub id; by default the place that the bundle names.
        is_trainable: Whether the adapter may be trained.
        revision: Branch, tag or commit sha on the Hub.
        token: As in huggingface_hub.
        cache_dir: As in huggingface_hub.
        **loading: Arguments for PEFT's `load_adapter`, such as `torch_device` or `low_cpu_mem_usage`.

    Returns:
        The PeftModel. As in PEFT, a further adapter is not made the active one.

    Raises:
        SubspaceError: There is no such bundle or task, the adapter's name is taken, or the model holds adapters of
            another method.
        BadFileError: The task's bytes are damaged.
        BasisNotFoundError: The basis cannot be found; the model was not touched.
        BasisMismatchError: The basis is not that of the bundle; the model was not touched.
    """
    check_known(loading, [*keywords_of(PeftModel.load_adapter, PeftModel.from_pretrained), *DISPATCH])
    found = _find(bundle, task, revision, token, cache_dir)
    name = task.replace(".", "_") if adapter_name is None else adapter_name
    if task not in found:
        task = _part_for(model, found, task, basis)
    own = _own_wanted(found, [task], as_lora, own_directions)
    _check_model(model, found, task, name, bool(as_lora))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch, "task")
        # the basis has to live until the model holds it: PEFT reads another configuration from the folder, which then
        # finds the basis in this process
        held = _write(found, task, folder, bool(as_lora), own, basis, _fill, model=model)
        inner = unwrapped(model)
        if isinstance(inner, (PeftModel, PeftMixedModel)):
            inner.load_adapter(str(folder), name, is_trainable=is_trainable, **loading)
        else:
            model = PeftModel.from_pretrained(model, str(folder), name, is_trainable=is_trainable, **loading)
    config = unwrapped(model).peft_config[name]
    if isinstance(config, SubspaceConfig) and held is not None:
        # the folder that PEFT has read it from is gone, and said less of this machine
        own = held[0]
        config.loaded_from, config.bundle, config.basis = own.loaded_from, own.bundle, own.to_dict()["basis"]
    return model


def extract_task(
    bundle: str | Path | Bundle,
    task: str,
    folder: str | Path,
    *,
    as_lora: bool | None = None,
    own_directions: bool | None = None,
    basis: SubspaceBasis | str | Path | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """Write one task of a bundle as a stock PEFT adapter folder: a subspace task, or a LoRA.

    Args:
        bundle: Folder, file or Hub id of a bundle, or an open one.
        task: The task's name in the bundle.
        folder: The folder to write, made where it does not exist.
        as_lora: See `load_task`.
        own_directions: See `load_task`.
        basis: See `load_task`.
        overwrite: Replace what else lies in `folder`; see `write_task` and `export_lora`.
        revision: Branch, tag or commit sha on the Hub.
        token: As in huggingface_hub.
        cache_dir: As in huggingface_hub.

    Returns:
        The folder.

    Raises:
        SubspaceError: There is no such bundle or task, or `folder` is a file.
        BadFileError: The task's bytes are damaged.
        BasisNotFoundError: The basis cannot be found.
        BasisMismatchError: The basis is not that of the bundle.
        OSError: The disk refuses; an earlier folder stays as it was.
    """
    found = _find(bundle, task, revision, token, cache_dir)
    folder = Path(folder)
    if task not in found:
        names = {part: f"{task}.{part}" for part in _parts(found, task)}
        own = _own_wanted(found, names.values(), as_lora, own_directions)
        given: dict[str, Any] = {"as_lora": as_lora, "own_directions": own, "basis": basis, "overwrite": overwrite}
        for part, name in names.items():
            extract_task(found, name, folder / part, **given)
        return folder
    own = _own_wanted(found, [task], as_lora, own_directions)
    planned = Planned(LORA if as_lora else TASK, found.fingerprint)
    check_target(folder, planned, overwrite=overwrite, needed=[found.location, basis])
    _write(found, task, folder, bool(as_lora), own, basis, partial(write_task, overwrite=overwrite), overwrite)
    return folder


def extract_tasks(
    bundle: str | Path | Bundle,
    out: str | Path,
    tasks: Iterable[str] | None = None,
    *,
    progress: bool = True,
    **how: Any,
) -> list[Path]:
    """Write several tasks of a bundle as adapter folders, each called by the task's name.

    Args:
        bundle: Folder, file or Hub id of a bundle, or an open one.
        out: The folder that the tasks' folders are written into.
        tasks: Names of tasks; all by default.
        progress: Show a bar where it takes longer than two seconds.
        **how: Further arguments of `extract_task`, whose errors are raised.

    Returns:
        The tasks' folders.
    """
    opened = {key: how.pop(key) for key in ("revision", "token", "cache_dir") if key in how}
    found = open_bundle(bundle, **opened)
    names = list(found) if tasks is None else list(tasks)
    for name in names:
        found.entry(name)
    _check_folders(found, Path(out), names, how)
    how["own_directions"] = _own_wanted(found, names, how.get("as_lora"), how.get("own_directions"))
    bar = progress_bar(names, desc="extracting", unit="task", shown=progress)
    return [extract_task(found, name, Path(out, check_name(name)), **how) for name in bar]


def _own_wanted(found: Bundle, tasks: Iterable[str], as_lora: bool | None, own_directions: bool | None) -> bool:
    """Return whether own directions come along, and warn where that is not what earlier versions did.

    They knew them as residuals: a task that had one was loaded as a LoRA, and with ``as_lora=False`` without it.
    """
    if own_directions is not None:
        return own_directions
    have = [task for task in tasks if found[task].extra_rank]
    if have and as_lora is False:
        warn_caller(
            f"{found.location}: as_lora=False leaves own directions (residuals) out, of {have[0]!r} here. Say"
            " own_directions=False (--no-own-directions) instead: a later version will keep them.",
            FutureWarning,
        )
        return False
    if as_lora is None and (earlier := [task for task in have if not found.names_own(task)]):
        warn_caller(
            f"{found.location}: {earlier[0]!r} has a residual, which earlier versions loaded as a stock LoRA. It is a"
            " subspace adapter now, with the residual in directions of its own: the same function. as_lora=True"
            " (--as-lora) gives the LoRA, own_directions=True the adapter without this warning.",
            FutureWarning,
        )
    return True


def _check_folders(found: Bundle, out: Path, names: list[str], how: Mapping[str, Any]) -> None:
    """Raise where one of the tasks' folders holds something else, before the first is written."""
    needed = [found.location, how.get("basis")]
    check_folder_names(out, names)
    for name in names:
        planned = Planned(LORA if how.get("as_lora") else TASK, found.fingerprint)
        check_target(out / check_name(name), planned, overwrite=how.get("overwrite", False), needed=needed)


def _find(bundle: Any, task: str, revision: Any, token: Any, cache_dir: Any) -> Bundle:
    found = open_bundle(bundle, revision=revision, token=token, cache_dir=cache_dir)
    if task not in found and not isinstance(bundle, Bundle):
        # added to the branch since it was opened
        found = reopen_bundle(found)
    if not _parts(found, task):
        found.entry(task)
    return found


def _parts(bundle: Bundle, task: str) -> list[str]:
    """Return the parts of a pipeline's task, which are tasks called ``<task>.<part>``; none where it is one task."""
    return [] if task in bundle else [part for part in PARTS if f"{task}.{part}" in bundle]


def _part_for(model: nn.Module, bundle: Bundle, task: str, basis: Any) -> str:
    """Return the name of the part of a pipeline's task that fits the model."""
    names = [f"{task}.{part}" for part in _parts(bundle, task)]
    parts = {}
    for name in names:
        found = bundle.config(name, basis).resolve()
        shapes = {} if found is None else found.shapes()
        parts[name] = {module: shapes[str(found.find(module))] for module in bundle.sizes(name) if found is not None}
    inner = unwrapped(model)
    inner = inner.get_base_model() if isinstance(inner, PeftModel) else inner
    return part_for(inner, f"{bundle.location}: {task}", parts, f"Load one by its name, such as {names[0]!r}.")


def _check_model(model: nn.Module, bundle: Bundle, task: str, name: str, as_lora: bool) -> None:
    model = unwrapped(model)
    known: Mapping[str, Any] = getattr(model, "peft_config", None) or {}
    if known and not isinstance(model, (PeftModel, PeftMixedModel)):
        raise SubspaceError(
            f"{type(model).__name__} has injected adapters. Extract the task, with `extract_task`, and load its folder"
            " with `subspace_peft.load_adapter`."
        )
    if name in known:
        raise SubspaceError(
            f"The model has an adapter {name!r} already: give another adapter_name, or delete it first."
        )
    wanted = "LORA" if as_lora else "SUBSPACE"
    others = sorted(
        {str(getattr(config.peft_type, "value", config.peft_type)) for config in known.values()} - {wanted}
    )
    if others and not isinstance(model, PeftMixedModel):
        why = "is to be a LoRA" if as_lora else "is a subspace adapter"
        remedy = (
            "without as_lora=True it is a subspace adapter"
            if as_lora
            else "as_lora=True loads it as one, where LoRAs are"
        )
        raise SubspaceError(
            f"{bundle.location}: task {task!r} {why}, and the model holds {', '.join(others)}. Load it into a model of"
            f" its own or into a PeftMixedModel; {remedy}."
        )


def _write(
    bundle: Bundle,
    task: str,
    folder: Path,
    as_lora: bool,
    own: bool,
    basis: Any,
    write: Callable[..., object],
    overwrite: bool = False,
    model: nn.Module | None = None,
) -> tuple[SubspaceConfig, SubspaceBasis | None] | None:
    """Write the adapter by `write`, `write_task` or `_fill`; return a subspace task's configuration and basis.

    A LoRA is written under the names that `model` has.
    """
    if as_lora:
        read = bundle.task(task, basis)
        export_lora(read if own else read.without_own(), folder, overwrite=overwrite, model=model)
        return None
    config, numbers = bundle.config(task, basis), bundle.read(task)
    found = config.resolve()
    whole = own or not numbers.own
    cores = numbers.cores if whole else bundle.task(task, basis).without_own().cores
    if not whole:
        config.extra_rank, config.extra_rank_pattern = 0, {}
    directions = own_tensors_of(config, numbers.own if own else {})
    tensors = {**core_tensors(config, cores), **directions, **numbers.extras}
    if config.card and any(key in config.card for key in MEASURED):
        # the parameters are those of the task that was packed, so what was measured of it holds of them as well
        config.card = (
            noted(config.card, of=digest_of(tensors))
            if whole
            else {key: value for key, value in config.card.items() if key not in (*MEASURED, "of")}
        )
    write(folder, config, tensors)
    return config, found


def _fill(folder: Path, config: SubspaceConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a task into a scratch folder, which PEFT reads at once: without a wait for the disk."""
    folder.mkdir()
    fill_folder(folder, config, tensors, card=False)
