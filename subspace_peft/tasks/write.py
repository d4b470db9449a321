"""Write a task's folder: the one place that does, whatever the task was made from."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from .._io.atomic import write_folder_aside
from .._io.occupied import TASK
from .._version import __version__
from ..basis.dependents import add_dependent
from ..basis.module_names import unwrapped_name
from ..basis.overwriting import Planned, replacing
from ..basis.recorded import own_places
from ..cards import Place
from ..errors import SubspaceError
from ..tuner.card import published
from ..tuner.config import SubspaceConfig
from ..tuner.own_directions import own_tensors
from ..tuner.task_file import BASIS_KEY, WEIGHTS_FILE
from .read import SavedTask

README_FILE = "README.md"
PREFIX = "base_model.model."  # PEFT's, before the name of every module of the base model


def write_task(
    folder: str | Path,
    config: SubspaceConfig,
    tensors: Mapping[str, torch.Tensor],
    *,
    place: Place | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a task as a folder that `PeftModel.from_pretrained` loads, as `PeftModel.save_pretrained` writes it.

    The folder gets ``adapter_model.safetensors``, ``adapter_config.json`` and, in ``README.md``, a section with the
    task's card. An earlier task in it is replaced once all three are on the disk; every other file stays, and so does
    whatever else the README says.

    Args:
        folder: Made where it does not exist.
        config: The task's configuration. Written with `inference_mode` on, so that a loaded task is not trained unless
            asked for, and with the version of this package.
        tensors: Key → tensor, coefficients and everything else that the task trained, with or without PEFT's prefix
            ``base_model.model.``; of any device, written with the dtype that they have.
        place: Where the card says to load the task from; the folder by default.
        overwrite: Replace what else lies there, such as a LoRA or a task on another basis. An earlier state of a task
            on the same basis is replaced in any case.

    Returns:
        The folder.

    Raises:
        OccupiedError: Something else lies in `folder`, and `overwrite` is off.
        SubspaceError: `folder` is a file; or the basis lives in memory only and is not among `tensors`.
        OSError: The disk refuses; the folder stays as it was.
    """
    folder = Path(folder)
    _check_basis(config, tensors)

    def write(scratch: Path) -> None:
        if (folder / README_FILE).is_file():
            shutil.copyfile(folder / README_FILE, scratch / README_FILE)
        fill_folder(scratch, config, tensors, place or Place.of_folder(folder))

    own = any(BASIS_KEY.match(key) for key in tensors)
    needed = [] if own else basis_places(config)
    with replacing(folder, planned_task(config), overwrite=overwrite, needed=needed):
        write_folder_aside(folder, write)
    if not own:
        add_dependent(config.basis_fingerprint, folder)
    return folder


def basis_places(config: SubspaceConfig) -> list[Path]:
    """Return the folders of this machine in which a task's basis lies, which nothing made of the task may replace."""
    reference = config.basis_reference
    return own_places(reference.location, reference.revision, reference.fingerprint, reference.near)


def planned_task(config: SubspaceConfig) -> Planned:
    """Return what `write_task` is about to write, for `check_target`."""
    basis = config.basis
    return Planned(TASK, config.basis_fingerprint or getattr(basis, "fingerprint", None))


def fill_folder(
    folder: Path,
    config: SubspaceConfig,
    tensors: Mapping[str, torch.Tensor],
    place: Place | None = None,
    *,
    card: bool = True,
) -> None:
    """Write a task's files straight into `folder`, a scratch folder that is thrown away where this fails.

    Args:
        folder: An empty folder, or one with a README only.
        config: See `write_task`.
        tensors: See `write_task`.
        place: See `write_task`.
        card: Whether the folder gets a card, which takes longer than the rest.
    """
    save_file(saved_tensors(tensors), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    carried = None
    if any(BASIS_KEY.match(key) for key in tensors):
        carried = config.taken_basis or config.basis_modules
    config.taken_basis = None
    # a copy with the values of a saved one, as PEFT gives them to it
    saved = replace(config, inference_mode=True, subspace_version=__version__, basis_modules=carried)
    with published({} if place is None else {folder: place}):
        # PEFT's own `save_pretrained` of a model calls this as well, once it has written the tensors
        if card:
            saved.save_pretrained(str(folder))
        else:
            saved.write(folder, place or Place.of_folder(folder))


def saved_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a task's tensors as its file holds them: PEFT's keys, contiguous, on the CPU, each in its own storage."""
    made: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for key, value in tensors.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory, such as tied weights
        made[f"{PREFIX}{unwrapped_name(key).removeprefix(PREFIX)}"] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return made


def task_tensors(task: SavedTask) -> dict[str, torch.Tensor]:
    """Return all tensors of a task with `core` coefficients as its file holds them: cores, own directions, extras.

    Raises:
        SubspaceError: A module has more directions of its own than the task's configuration says, which would be lost.
    """
    config = task.config
    for module, (B, A) in task.own.items():
        rank = config.sizes.extra_of(module, {"out": B.shape[0], "in": A.shape[1]})
        if rank < min(B.shape[1], *(B.shape[0], A.shape[1])):
            raise SubspaceError(
                f"module {module!r} has {B.shape[1]} directions of the task's own, and its configuration says {rank}:"
                " give it extra_rank= or extra_rank_pattern= to match."
            )
    return {**core_tensors(config, task.cores), **own_tensors_of(config, task.own), **task.extras}


def core_tensors(config: SubspaceConfig, cores: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return `core` coefficients as a task's file holds them, float32.

    Args:
        config: The task's configuration, with `core` coefficients.
        cores: Module → (k_out, k_in), in units of ΔW.
    """
    tensors = {}
    for module, core in cores.items():
        scale = config.sizes.scale(module, {"k_out": core.shape[0], "k_in": core.shape[1]})
        tensors[f"{PREFIX}{module}.subspace_coef.weight"] = (core.double() / scale).float()
    return tensors


def own_tensors_of(
    config: SubspaceConfig, own: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Return own directions as a task's file holds them, float32.

    Args:
        config: The task's configuration, whose `extra_rank` and pattern say how many each module has.
        own: Module → ``(B, A)``, (out, r) and (r, in), in units of ΔW.

    Returns:
        Key → tensor, of every module that the configuration gives own directions.
    """
    tensors = {}
    for module, (B, A) in own.items():
        rank = config.sizes.extra_of(module, {"out": B.shape[0], "in": A.shape[1]})
        units = config.sizes.own_units(module, B.shape[0], A.shape[1])
        for name, value in own_tensors(B, A, rank, units).items() if rank else ():
            tensors[f"{PREFIX}{module}.subspace_coef.{name}"] = value
    return tensors


def _check_basis(config: SubspaceConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `SubspaceError` where a loaded task would not find its basis again."""
    if any(BASIS_KEY.match(key) for key in tensors):
        return
    if config.generated or config.to_dict()["basis"] is None:
        raise SubspaceError(
            "The task refers to its basis, which lives in memory only and has to be stored first:"
            " `basis.save_pretrained(folder)`, before the model is adapted."
        )
