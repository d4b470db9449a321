"""Write a task as LoRA files that other programs read: PEFT's folder, or diffusers' file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .._io.atomic import write_all_aside
from .._io.occupied import LORA, MARK, sort_metadata
from .._shown import Shown, short, size
from ..basis.overwriting import Planned, replacing
from ..energy import percent
from ..errors import BadFileError
from ..tasks.read import SavedTask
from .factored import factored
from .pipeline_export import FILE, check_plain, in_diffusers_names


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
    made = factored(read, rank, pad_to, dtype)
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
    made = {part: factored(read, rank, pad_to, dtype) for part, read in reads.items()}
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
