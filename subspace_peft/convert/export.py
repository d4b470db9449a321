"""Export a task as a stock PEFT LoRA, exactly, without an SVD of anything larger than a core."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._io.occupied import LORA
from .._io.warn import warn_caller
from .._moved import moved_name
from ..basis import SubspaceBasis
from ..basis.module_names import plain_name
from ..basis.module_store import names_of
from ..basis.overwriting import Planned, check_target
from ..errors import SubspaceError
from ..tasks.pipeline_task import parts_of_folder
from ..tasks.read import read_task
from ..tasks.write import basis_places
from ..tuner import SubspaceConfig
from ..tuner.loaded_from import LoadedFrom
from ..tuner.renaming import names_in
from ..tuner.targets import outer_modules
from .lora_files import Export, planned_lora, write_diffusers, write_lora
from .pipeline_export import check_part, in_installed_names, part_of

FORMATS = ("peft", "diffusers")


def export_lora(
    task: Any,
    out: str | Path,
    *,
    adapter_name: str | None = None,
    basis: SubspaceBasis | str | None = None,
    rank: int | None = None,
    pad_to: int | str | None = None,
    modules_to_save: bool | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    format: str = "peft",
    part: str | None = None,
    model: nn.Module | None = None,
    **hub: Any,
) -> Export:
    """Write a task as a stock PEFT LoRA folder, or as a LoRA file of diffusers.

    With k_in ≤ k_out, ``lora_A = V`` and ``lora_B = s·U·C``; else ``lora_A = s·C·V`` and ``lora_B = U``: the same ΔW,
    without an SVD. Own directions stand beside these, so that the rank is k + φ. A smaller `rank` takes the SVD of the
    core alone, which is optimal since U and V are orthonormal, or with own directions one of (k + φ) × (k + φ).
    Every module gets the same rank, filled up with zeros, and ``lora_alpha = r``, so that no patterns are needed.

    Args:
        task: Folder or Hub id of a saved task; the folder of a pipeline's task, whose parts are all exported; a live
            PeftModel, exported at its configured scale (`set_scale` aside); or a `SavedTask`, such as a bundle's.
        out: The folder to write, made where it does not exist.
        adapter_name: The adapter of a live model; the active one by default.
        basis: The basis, its folder or its Hub id; by default the place that the task's config names.
        rank: Highest rank, reached by truncation; None keeps all.
        pad_to: A rank to fill up to with zeros, or ``"vllm"`` for the next one that vLLM serves.
        modules_to_save: Whether the task's other trained modules (a classifier) are written as well. None: yes, but
            not with ``pad_to="vllm"``, since vLLM refuses most of them; a warning then names those left out.
        dtype: The dtype of the written factors.
        overwrite: Replace what else lies in `out`, such as a LoRA that is no export from the same basis. An earlier
            export from it is replaced in any case.
        format: ``"peft"``: a PEFT folder, of a pipeline's task one per part, ``out/unet`` and so on. ``"diffusers"``:
            one file, ``pytorch_lora_weights.safetensors``, which ``pipe.load_lora_weights(out)`` and
            ``unet.load_lora_adapter(out, prefix="unet")`` load.
        part: With ``format="diffusers"``, the part of the pipeline that the task is of, such as ``unet``, where its
            basis and its modules do not tell.
        model: The model that the LoRA is for, whose modules' names are then written, where it calls them otherwise.
        **hub: `revision`, `token`, `cache_dir` and `subfolder` of a task on the Hub.

    Raises:
        OccupiedError: Something else lies in `out`, or it is the task's own folder, and `overwrite` is off.
        SubspaceError: It is not a subspace task, a rank is out of range, or `out` is a file.
        OSError: The disk refuses; an earlier folder stays as it was.
    """
    if rank is not None and rank < 1:
        raise SubspaceError(f"rank={rank}: give at least 1.")
    if format not in FORMATS:
        raise SubspaceError(f"format={format!r}: choose one of {', '.join(FORMATS)}.")
    how: dict[str, Any] = {"rank": rank, "pad_to": pad_to, "dtype": dtype, "overwrite": overwrite}
    parts = [] if hub.get("subfolder") else parts_of_folder(task)
    _warn_of_ignored(part, model, format, parts)
    if parts and format == "peft":
        how |= {"basis": basis, "modules_to_save": modules_to_save}
        models = {}
        for each in parts:
            config = SubspaceConfig.from_pretrained(str(Path(task, each)))
            planned = Planned(LORA, config.basis_fingerprint)
            check_target(Path(out, each), planned, overwrite=overwrite, inputs=[task])
            own = (config.loaded_from or LoadedFrom()).modules or {}
            models[each] = model if model is not None and not _absent(model, own) else None
        made = [export_lora(Path(task, each), Path(out, each), model=models[each], **how, **hub) for each in parts]
        return _together(out, made)
    if parts:
        reads = {each: read_task(Path(task, each), basis=basis, **hub) for each in parts}
    else:
        read = read_task(task, adapter_name=adapter_name, basis=basis, **hub)
        reads = {check_part(part or part_of(read), task) if format == "diffusers" else "": read}
    needed = [place for read in reads.values() for place in basis_places(read.config)]
    first = next(iter(reads.values()))
    check_target(out, planned_lora(first), overwrite=overwrite, inputs=[task], needed=needed)
    if modules_to_save is None:
        modules_to_save = pad_to != "vllm"
        if first.extras and not modules_to_save:
            warnings.warn(
                f"{task}: the task has trained {names_of(first.extras, 3)} as well, which stays behind since vLLM"
                " refuses it. Pass modules_to_save=True (--modules-to-save) to keep it, or modules_to_save=False"
                " (--no-modules-to-save) to leave it out without this warning.",
                stacklevel=2,
            )
    if format == "diffusers":
        return write_diffusers(reads, out, modules_to_save=modules_to_save, **how)
    if model is not None and (absent := _absent(model, first.cores)):
        raise SubspaceError(
            f"{task}: {len(absent)} of its {len(first.cores)} modules are not in the given model, such as"
            f" {names_of(absent, 3)}. model= is the model that the LoRA is for; leave it out to keep the task's names."
        )
    names = in_installed_names(part or part_of(first), first) if model is None else names_in(model, first.cores)
    return write_lora(first.renamed(names), out, modules_to_save=modules_to_save, **how)


def _absent(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the modules that `model` has under no name."""
    own = {plain_name(name) for name, _ in outer_modules(model)}
    renamed = names_in(model, names)
    return [name for name in names if renamed.get(name, name) not in own]


def _warn_of_ignored(part: str | None, model: nn.Module | None, format: str, parts: list[str]) -> None:
    """Warn of arguments of `export_lora` that decide nothing."""
    if part is not None and (parts or (format == "peft" and part != "text_encoder")):
        why = f"all parts are exported, {', '.join(parts)}" if parts else "the task keeps its names in a PEFT folder"
        warn_caller(f"export_lora: part={part!r} (--part {part}) has no effect: {why}.")
    if model is not None and format == "diffusers":
        warn_caller("export_lora: model= has no effect with format='diffusers', whose files have names of their own.")


def _together(out: str | Path, exports: Sequence[Export]) -> Export:
    """Return the account of several parts' exports; the energy kept is the least of theirs."""
    return Export(
        str(out),
        max(each.rank for each in exports),
        sum(each.modules for each in exports),
        sum(each.bytes for each in exports),
        min(each.energy_kept for each in exports),
        sorted({name for each in exports for name in each.modules_to_save}),
    )


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
