"""Export a task as a stock PEFT LoRA, exactly, without an SVD of anything larger than a core."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from .._io.atomic import write_all_aside
from .._io.occupied import LORA, MARK, sort_metadata
from .._io.warn import warn_caller
from .._shown import Shown, short, size
from ..basis import ModuleBasis, SubspaceBasis
from ..basis.module_names import plain_name
from ..basis.module_store import names_of
from ..basis.overwriting import Planned, check_target, replacing
from ..energy import percent
from ..errors import BadFileError, SubspaceError
from ..sources import Factors
from ..tasks.pipeline_task import parts_of_folder
from ..tasks.read import SavedTask, read_task
from ..tasks.write import basis_places
from ..tuner import SubspaceConfig
from ..tuner.loaded_from import LoadedFrom
from ..tuner.renaming import names_in
from ..tuner.targets import outer_modules
from .pipeline_export import FILE, check_part, check_plain, in_diffusers_names, in_installed_names, part_of

FORMATS = ("peft", "diffusers")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True, repr=False)
class Export(Shown):
    """The account of `export_lora`.

    Attributes:
        folder: The LoRA's folder.
        rank: The LoRA's r, the same for every module.
        modules: Number of adapted modules.
        bytes: Bytes of the file of its weights.
        energy_kept: Share of ‖ΔW‖² that is in it: 1 unless a smaller `rank` was asked for.
        modules_to_save: Names of the modules that were written whole.
    """

    folder: str
    rank: int
    modules: int
    bytes: int
    energy_kept: float
    modules_to_save: list[str]

    def _shown_facts(self) -> Iterator[tuple[str, Any]]:
        yield "rank", self.rank
        yield "modules", self.modules
        yield "size", size(self.bytes)
        yield "energy kept", percent(self.energy_kept)
        yield "trained whole", ", ".join(self.modules_to_save) or None
        yield "at", short(self.folder)

    def to_dict(self) -> dict[str, Any]:
        """Return the account as JSON values."""
        return asdict(self)


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
    without an SVD. A smaller `rank` takes the SVD of the core alone, which is optimal since U and V are orthonormal.
    Every module gets the same rank, filled up with zeros, and ``lora_alpha = r``, so that no patterns are needed.

    Args:
        task: Folder or Hub id of a saved task; the folder of a pipeline's task, whose parts are all exported; a live
            PeftModel, exported at its configured scale (`set_scale` aside); or a `SavedTask`, such as a bundle's,
            whose residual is included.
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


def planned_lora(read: SavedTask) -> Planned:
    """Return what `write_lora` is about to write, for `check_target`."""
    return Planned(LORA, read.config.basis_fingerprint)


def write_lora(
    read: SavedTask,
    out: str | Path,
    *,
    rank: int | None = None,
    pad_to: int | str | None = None,
    modules_to_save: bool = False,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> Export:
    """Write a task as a stock PEFT LoRA folder; see `export_lora`.

    Args:
        read: The task.
        out: The folder to write, made where it does not exist.
        rank: See `export_lora`.
        pad_to: See `export_lora`.
        modules_to_save: Whether the task's other trained modules are written as well.
        dtype: The dtype of the written factors.
        overwrite: See `export_lora`.

    Raises:
        SubspaceError: A rank is out of range, `out` is a file, or holds something else.
        BadFileError: The task's config gives a weight another shape than the basis has.
        OSError: The disk refuses; an earlier folder stays as it was.
    """
    made = _factored(read, rank, pad_to, dtype)
    tensors: dict[str, torch.Tensor] = {}
    for name, (B, A) in made.factors.items():
        tensors |= _as_peft_has_it(f"base_model.model.{name}", A, B, (read.config.weight_shapes or {}).get(name))
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    config = _lora_config(read, made.r, modules_to_save)
    if modules_to_save:
        tensors |= {key: value.contiguous() for key, value in read.extras.items()}
    folder = Path(out)
    weights = folder / "adapter_model.safetensors"
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"

    def write(path: Path) -> None:
        # the mark tells an export from the result of a training, which no later export may replace
        mark = read.config.basis_fingerprint
        save_file(tensors, path, metadata={"format": "pt", **({} if mark is None else {MARK: mark})})
        sort_metadata(path)

    with replacing(folder, planned_lora(read), overwrite=overwrite):
        write_all_aside(
            {
                weights: write,
                folder / "adapter_config.json": lambda path: path.write_text(text, encoding="utf-8"),
            }
        )
    return Export(
        str(folder),
        made.r,
        len(made.factors),
        weights.stat().st_size,
        made.kept / made.total if made.total else 1.0,
        list(config["modules_to_save"] or []),
    )


def write_diffusers(
    reads: Mapping[str, SavedTask],
    out: str | Path,
    *,
    rank: int | None = None,
    pad_to: int | str | None = None,
    modules_to_save: bool = True,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> Export:
    """Write the tasks of a pipeline's parts as one LoRA file of diffusers; see `export_lora`.

    Args:
        reads: Part → its task.
        out: The folder to write, made where it does not exist.
        rank: See `export_lora`.
        pad_to: See `export_lora`.
        modules_to_save: Whether trained modules, which such a file cannot hold, are refused, not left out.
        dtype: The dtype of the written factors.
        overwrite: See `export_lora`.

    Raises:
        SubspaceError: A rank is out of range, `out` is a file, or a task has tensors that such a file does not hold.
        OSError: The disk refuses; an earlier file stays as it was.
    """
    tensors: dict[str, torch.Tensor] = {}
    made = {part: _factored(read, rank, pad_to, dtype) for part, read in reads.items()}
    for part, read in reads.items():
        check_plain(read, part, modules_to_save)
        for name, (B, A) in made[part].factors.items():
            shape = (read.config.weight_shapes or {}).get(name)
            tensors |= _as_peft_has_it(in_diffusers_names(part, name), A, B, shape)
    first = next(iter(reads.values()))
    file = Path(out, FILE)
    mark = first.config.basis_fingerprint

    def write(path: Path) -> None:
        save_file(tensors, path, metadata={"format": "pt", **({} if mark is None else {MARK: mark})})
        sort_metadata(path)

    tensors = {key: value.contiguous() for key, value in tensors.items()}
    with replacing(Path(out), planned_lora(first), overwrite=overwrite):
        write_all_aside({file: write})
    kept, total = sum(each.kept for each in made.values()), sum(each.total for each in made.values())
    return Export(
        str(out),
        max(each.r for each in made.values()),
        sum(len(each.factors) for each in made.values()),
        file.stat().st_size,
        kept / total if total else 1.0,
        [],
    )


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


@dataclass(frozen=True, eq=False)
class _Factored:
    """A task's LoRA factors, all of rank r: module → (B, A); and the energy kept, of how much in total."""

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    r: int
    kept: float
    total: float


def _factored(read: SavedTask, rank: int | None, pad_to: int | str | None, dtype: torch.dtype) -> _Factored:
    factors, kept, total = {}, 0.0, 0.0
    for name, core in read.cores.items():
        S = torch.linalg.svdvals(core)
        if name in read.residual:
            factors[name], S = _with_residual(lora_factors(read.modules[name], core), read.residual[name], rank)
        else:
            factors[name] = lora_factors(read.modules[name], core, rank)
        total += float(S.square().sum())
        kept += float(S[:rank].square().sum())
    most = max(B.shape[1] for B, _ in factors.values())
    if rank is not None and rank > most:
        warn_caller(
            f"export_lora: rank={rank} (--rank {rank}) has no effect: the task's rank is {most}. pad_to="
            " (--pad-to) fills up to a higher one."
        )
    r = _padded(most, pad_to)
    filled = {}
    for name, (B, A) in factors.items():
        fill = r - B.shape[1]
        B, A = torch.nn.functional.pad(B, (0, fill)), torch.nn.functional.pad(A, (0, 0, 0, fill))
        filled[name] = B.to(dtype), A.to(dtype)
    return _Factored(filled, r, kept, total)


def lora_factors(
    module: ModuleBasis, core: torch.Tensor, rank: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute LoRA factors of ``U core V``, or of its best approximation of a given rank.

    Args:
        module: The basis of the module, with orthonormal U and V.
        core: (k_out, k_in), in units of ΔW.
        rank: The rank of the approximation; None is exact.

    Returns:
        ``(B, A)``, (out, r) and (r, in) float64.
    """
    U, V = module.U.double(), module.V.double()
    core = core.double()
    if rank is not None and rank < min(core.shape):
        P, S, Th = torch.linalg.svd(core, full_matrices=False)
        return U @ (P[:, :rank] * S[:rank]), Th[:rank] @ V
    return (U @ core, V) if core.shape[1] <= core.shape[0] else (U, core @ V)


def _with_residual(
    projected: tuple[torch.Tensor, torch.Tensor], residual: tuple[torch.Tensor, torch.Tensor], rank: int | None
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return ``(B, A)`` of the sum, or of its best approximation of rank `rank`, and the sum's singular values."""
    B, A = (torch.cat([one, two.double()], dim) for one, two, dim in zip(projected, residual, (1, 0), strict=True))
    P, S, T = Factors(B, A).canonical()
    return ((B, A) if rank is None or rank >= B.shape[1] else (P[:, :rank] * S[:rank], T[:, :rank].T)), S


def _as_peft_has_it(
    name: str, A: torch.Tensor, B: torch.Tensor, weight_shape: list[int] | None
) -> dict[str, torch.Tensor]:
    if weight_shape is None:
        return {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    rows, columns = weight_shape[0], math.prod(weight_shape[1:])
    if (len(B), A.shape[1]) != ((columns, rows) if len(weight_shape) == 2 else (rows, columns)):
        raise BadFileError(
            f"{name}: the task's config says that the weight is {weight_shape}, which its basis of {len(B)} ×"
            f" {A.shape[1]} does not fit. The config was altered: fetch or save the task again."
        )
    if len(weight_shape) == 2:
        return {f"{name}.lora_embedding_A": A, f"{name}.lora_embedding_B": B}
    return {f"{name}.lora_A.weight": A.view(len(A), *weight_shape[1:]), f"{name}.lora_B.weight": B[:, :, None, None]}


def _padded(rank: int, pad_to: int | str | None) -> int:
    if pad_to is None:
        return rank
    if pad_to == "vllm":
        fits = [r for r in VLLM_RANKS if r >= rank]
        if not fits:
            raise SubspaceError(
                f"vLLM serves ranks up to {VLLM_RANKS[-1]}, this task needs {rank}: pass rank= as well."
            )
        return fits[0]
    if not isinstance(pad_to, int) or isinstance(pad_to, bool) or pad_to < rank:
        raise SubspaceError(
            f"pad_to={pad_to!r}: the task has rank {rank}; give at least that, or 'vllm', or a smaller rank=."
        )
    return pad_to


def _lora_config(task: SavedTask, r: int, keep_modules: bool) -> dict[str, Any]:
    from peft import LoraConfig

    source = task.config
    targets = source.target_modules
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=targets if isinstance(targets, str) else sorted(targets or task.cores),
        exclude_modules=source.exclude_modules,
        layers_to_transform=source.layers_to_transform,
        layers_pattern=source.layers_pattern,
        modules_to_save=source.modules_to_save if keep_modules else None,
        fan_in_fan_out=source.fan_in_fan_out,
        task_type=source.task_type,
        base_model_name_or_path=source.base_model_name_or_path,
        revision=source.revision,
        inference_mode=True,
    ).to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
