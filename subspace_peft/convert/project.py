"""Project a LoRA onto a shared basis, and measure the share of its energy that the basis keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..base_names import REMEDY, difference, is_of, said_of_basis
from ..basis import SubspaceBasis
from ..basis.module_store import names_of
from ..energy import of_source, share_of, word
from ..errors import BasisMismatchError, SubspaceError
from ..sources import Source, open_source
from ..sources.guesses import warn_of_guesses
from ..sources.lora import is_embedding, is_saved_module, saved_modules
from ..tasks.read import Parts, SavedTask
from ..tasks.write import core_tensors, write_task
from ..tuner import SubspaceConfig


@dataclass(frozen=True, eq=False)
class Projection:
    """A LoRA's coefficients in a basis.

    Attributes:
        source: The LoRA.
        basis: The basis.
        cores: Module of the basis → ``C = Uᵀ ΔW Vᵀ`` (k_out, k_in) float64, the least-squares optimum.
        energy: Module of the basis → ‖C‖² / ‖ΔW‖², the share kept (1 for a module whose ΔW is zero).
        energy_random: The share that a random basis of the same size keeps on average.
        energy_kept: The share over all modules together, see `subspace_peft.energy`.
    """

    source: Source
    basis: SubspaceBasis
    cores: dict[str, torch.Tensor]
    energy: dict[str, float]
    energy_random: float
    energy_kept: float

    @property
    def relative_error(self) -> float:
        """‖ΔW − U C V‖ / ‖ΔW‖ over all modules."""
        return math.sqrt(max(0.0, 1 - self.energy_kept))

    @property
    def verdict(self) -> str:
        """Class of the energy kept: ``faithful``, ``partial`` or ``poor``.

        Measure the task's own score before relying on it.
        """
        return word(self.energy_kept)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the tensors, as JSON values."""
        return {
            "source": self.source.location,
            "basis": self.basis.location,
            "fingerprint": self.basis.fingerprint,
            "energy_kept": self.energy_kept,
            "energy_random": self.energy_random,
            "relative_error": self.relative_error,
            "verdict": self.verdict,
            "modules": self.energy,
            **self.source.conversion,
        }

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the projection as a task's folder, which `PeftModel.from_pretrained` loads.

        The LoRA's `modules_to_save` are written as well.

        Args:
            folder: Made where it does not exist.
            overwrite: See `write_task`.

        Returns:
            The folder.

        Raises:
            SubspaceError: The basis lives in memory only; or `folder` is a file.
            OSError: The disk refuses; an earlier folder stays as it was.
        """
        task = self.as_task()
        return write_task(
            folder, task.config, {**core_tensors(task.config, task.cores), **task.extras}, overwrite=overwrite
        )

    def as_task(self) -> SavedTask:
        """Return the projection as a task.

        Raises:
            SubspaceError: The basis lives in memory only.
        """
        if self.basis.location is None:
            raise SubspaceError(
                "The projection refers to its basis, which has to be stored: `basis.save_pretrained(folder)` first."
            )
        names = {key: self.source.aliases.get(key, key) for key in self.source.keys}
        keys = {name: str(self.basis.find(key)) for key, name in names.items()}
        config = self._config(sorted(keys))
        cores = {name: self.cores[key] for name, key in keys.items()}
        return SavedTask(
            config,
            cores,
            Parts({name: tuple(core.shape) for name, core in cores.items()}, self.basis, keys),
            _extras(self.source),
        )

    def _config(self, targets: list[str]) -> SubspaceConfig:
        source = self.source.config
        kept = {
            key: source[key]
            for key in ("task_type", "modules_to_save", "revision", "fan_in_fan_out")
            if source.get(key)
        }
        if "modules_to_save" in kept:
            kept["modules_to_save"] = saved_modules(source)
        config = SubspaceConfig(
            basis=self.basis.location,
            basis_revision=self.basis.revision,
            basis_fingerprint=self.basis.fingerprint,
            target_modules=targets,
            base_model_name_or_path=self.source.base_model,
            inference_mode=True,
            **kept,
        )
        shapes = {self.source.aliases.get(key, key): self.source.weight_shape(key) for key in self.source.keys}
        config.weight_shapes = {name: shape for name, shape in shapes.items() if shape is not None} or None
        return config


def project_lora(
    lora: Any,
    basis: SubspaceBasis | str | Path,
    *,
    token: str | bool | None = None,
    check_base_model: bool = True,
    base_model_name: str | None = None,
    allow_bin: bool = False,
    base_model: nn.Module | None = None,
) -> Projection:
    """Project an existing LoRA onto a basis, in closed form: ``C = (UᵀB)(AVᵀ)`` per module.

    Args:
        lora: Folder, Hub id with ``@revision``, state dict, ``(state_dict, config)`` or live PeftModel.
        basis: The basis, its folder or its Hub id.
        token: As in huggingface_hub.
        check_base_model: Refuse a LoRA whose config names another base model than the basis.
        base_model_name: The base model that the LoRA is of, whatever its config says; held against the basis's.
        allow_bin: Take pickled weights too, read with ``weights_only=True``.
        base_model: The model that the adapter adapts, to convert a DoRA, an adapter of another method and the like to
            a LoRA; it is left as it was.

    Raises:
        SourceError: The LoRA cannot be read.
        BasisMismatchError: The basis lacks a module or has it in another shape, or the base models differ.
        SubspaceError: Every ``lora_B`` is zero; the LoRA has trained tensors that a task cannot hold (single token
            embeddings, biases of the base model); or `base_model_name` is another model on the Hub than the basis's.
    """
    source = open_source(lora, token=token, allow_bin=allow_bin, base_model=base_model)
    _check_extras(source)
    warn_of_guesses([source])
    if not isinstance(basis, SubspaceBasis):
        basis = SubspaceBasis.from_pretrained(basis, token=token)
    if base_model_name is not None:
        source.said_base = said_of_basis(basis.base_model, base_model_name)
    elif check_base_model and not is_of(source.base_model, basis.info):
        own, other = str(source.base_model), str(basis.base_model)
        raise BasisMismatchError(
            f"{source.location}: trained on {own!r}, but the basis was built for {other!r}: {difference(own, other)}."
            f" Use a basis of the same base model. {REMEDY} check_base_model=False (--no-base-check) accepts any."
        )
    absent = [name for name in source.keys if basis.find(name) is None]
    if absent:
        raise BasisMismatchError(
            f"{source.location}: {len(absent)} of its modules are not in the basis, such as {names_of(absent, 3)}; it"
            f" has {names_of(basis, 3)}. Build a basis from sources that adapt these modules."
        )
    cores: dict[str, torch.Tensor] = {}
    energy: dict[str, float] = {}
    random: dict[str, float] = {}
    norms: dict[str, float] = {}
    for name in source.keys:
        key = str(basis.find(name))
        module, update = basis[key], source.factors(name)
        try:
            core = module.project((update.B, update.A))
        except BasisMismatchError as error:
            raise BasisMismatchError(f"{source.location}: module {name!r}: {error}") from None
        norms[key] = update.norm()
        cores[key], energy[key] = core, share_of(float(core.square().sum()), norms[key] ** 2)
        random[key] = module.k_out * module.k_in / (module.out_features * module.in_features)
    if not any(norms.values()):
        raise SubspaceError(f"{source.location}: every lora_B is zero, so there is nothing to project.")
    return Projection(source, basis, cores, energy, of_source(random, norms), of_source(energy, norms))


def _extras(source: Source) -> dict[str, torch.Tensor]:
    """Read the tensors that a task keeps as they are: of a LoRA's `modules_to_save`, and its whole embeddings.

    PEFT saves those of a model that was given further tokens, and loads them into the base model.
    """
    return {source.plain(key): source.read(key).detach().cpu().contiguous() for key in source.other_keys}


def _check_extras(source: Source) -> None:
    """Raise `SubspaceError` where a LoRA has trained tensors that a task cannot hold."""
    saved = saved_modules(source.config)
    for key in source.other_keys:
        if not (is_saved_module(source.plain(key), source.config) or is_embedding(source.plain(key))):
            raise SubspaceError(
                f"{source.location}: {key} was trained with the LoRA, and is neither a factor nor of its"
                f" modules_to_save ({', '.join(saved) or 'none'}). A projected task cannot hold it, and without it the"
                " adapter is another: train without trainable_token_indices and with bias='none'."
            )
