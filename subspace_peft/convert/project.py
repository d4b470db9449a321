"""Project a LoRA onto a shared basis, and measure the share of its energy that the basis keeps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .._shown import Shown, Table, fingerprint, short
from ..base_names import REMEDY, difference, is_of, said_of_basis
from ..basis import SubspaceBasis
from ..basis.module_names import has_peft_prefix
from ..basis.module_store import names_of
from ..basis.overwriting import check_target
from ..basis.pipeline_parts import parts_in, split_part
from ..energy import of_source, percent, share_of, word
from ..errors import BasisMismatchError, SubspaceError
from ..sources import Source, open_source
from ..sources.guesses import warn_of_guesses
from ..sources.lora import is_embedding, is_saved_module, saved_modules

if TYPE_CHECKING:
    from ..tasks.read import SavedTask
    from ..tuner import SubspaceConfig

# PEFT is for tasks: measuring what a basis keeps of a LoRA does without, and is done in a tenth of the time


@dataclass(frozen=True, eq=False, repr=False)
class Projection(Shown):
    """A LoRA's coefficients in a basis.

    Attributes:
        source: The LoRA.
        basis: The basis.
        cores: Module of the basis → ``C = Uᵀ ΔW Vᵀ`` (k_out, k_in) float64, the least-squares optimum.
        energy: Module of the basis → ‖C‖² / ‖ΔW‖², the share kept (1 for a module whose ΔW is zero).
        energy_random: The share that a random basis of the same size keeps on average.
        energy_kept: The share over all modules together.
        places: Module of the LoRA → module of the basis.
    """

    source: Source
    basis: SubspaceBasis
    cores: dict[str, torch.Tensor]
    energy: dict[str, float]
    energy_random: float
    energy_kept: float
    places: dict[str, str]

    def _shown_facts(self) -> Iterator[tuple[str, Any]]:
        yield "source", short(self.source.location)
        yield "modules", len(self.cores)
        yield "energy kept", f"{percent(self.energy_kept)} ({self.verdict})"
        yield "by a random basis", percent(self.energy_random)
        yield "basis", fingerprint(self.basis.fingerprint)

    def _shown_table(self) -> Table:
        rows = ((name, percent(each)) for name, each in self.energy.items())
        return ("module", "energy kept"), rows, len(self.energy)

    @property
    def parts(self) -> dict[str, Projection]:
        """The projections of the parts of a pipeline, ``unet`` and the like; empty where the LoRA is of one model."""
        return {part: self._of_part(part) for part in self.source.parts}

    def _of_part(self, part: str) -> Projection:
        source = self.source
        keys = {name: sides for name, sides in source.keys.items() if source.split(name)[0] == part}
        # those of no part are in each, which no task can be made of then
        others = tuple(key for key in source.other_keys if split_part(source.plain(key))[0] in ("", part))
        own = replace(source, keys=keys, other_keys=others)
        return _projection(own, self.basis, {name: self.places[name] for name in keys}, self.cores)

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

        The LoRA's `modules_to_save` are written as well. Of a pipeline's LoRA each part is a task of its own, under
        the names that its model has: one part is written into `folder`, several into ``folder/unet``,
        ``folder/text_encoder`` and so on.

        Args:
            folder: Made where it does not exist.
            overwrite: See `write_task`.

        Returns:
            The folder.

        Raises:
            SubspaceError: The basis lives in memory only; or `folder` is a file.
            OSError: The disk refuses; an earlier folder stays as it was.
        """
        from ..tasks.write import core_tensors, planned_task, write_task

        if len(parts := self.parts) > 1:
            tasks = {part: projection.as_task() for part, projection in parts.items()}
            for part, task in tasks.items():
                check_target(Path(folder, part), planned_task(task.config), overwrite=overwrite)
            for part, task in tasks.items():
                tensors = {**core_tensors(task.config, task.cores), **task.extras}
                write_task(Path(folder, part), task.config, tensors, overwrite=overwrite)
            return Path(folder)
        task = self.as_task()
        return write_task(
            folder, task.config, {**core_tensors(task.config, task.cores), **task.extras}, overwrite=overwrite
        )

    def as_task(self) -> SavedTask:
        """Return the projection as a task.

        Raises:
            SubspaceError: The basis lives in memory only, or the LoRA is of several parts of a pipeline.
        """
        from ..tasks.read import Parts, SavedTask

        if len(self.source.parts) > 1:
            raise SubspaceError(
                f"{self.source.location}: it adapts {' and '.join(self.source.parts)}, which are models of their own,"
                " with a task each: take one from the projection's parts, such as"
                f" projection.parts[{self.source.parts[0]!r}], or write all with save_pretrained (--out)."
            )
        if self.basis.location is None:
            raise SubspaceError(
                "The projection refers to its basis, which has to be stored: `basis.save_pretrained(folder)` first."
            )
        names = {key: self.source.split(key)[1] for key in self.source.keys}
        keys = {name: self.places[key] for key, name in names.items()}
        config = self._config(keys)
        cores = {name: self.cores[key] for name, key in keys.items()}
        return SavedTask(
            config,
            cores,
            Parts({name: tuple(core.shape) for name, core in cores.items()}, self.basis, keys),
            _extras(self.source),
        )

    def _config(self, keys: dict[str, str]) -> SubspaceConfig:
        from ..tuner import SubspaceConfig
        from ..tuner.module_names import other_names

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
            target_modules=sorted(keys),
            base_model_name_or_path=self.source.base_model,
            inference_mode=True,
            **kept,
        )
        config.basis_names = other_names(self.basis, keys)
        shapes = {self.source.split(key)[1]: self.source.weight_shape(key) for key in self.source.keys}
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
    part: str | None = None,
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
        part: Of a pipeline's basis the part that the LoRA is of, such as ``text_encoder_2``, where its modules' names
            do not tell.

    Raises:
        SourceError: The LoRA cannot be read.
        BasisMismatchError: The basis lacks a module or has it in another shape, or the base models differ, by their
            names or by the weights on record.
        SubspaceError: Every ``lora_B`` is zero; the LoRA has trained tensors that a task cannot hold (single token
            embeddings, biases of the base model); or `base_model_name` is another model on the Hub than the basis's.
    """
    source = open_source(lora, token=token, allow_bin=allow_bin, base_model=base_model)
    _check_extras(source)
    warn_of_guesses([source])
    if not isinstance(basis, SubspaceBasis):
        basis = SubspaceBasis.from_pretrained(basis, token=token)
    if base_model is not None and check_base_model:
        from ..tuner.base_record import hold_against

        hold_against(basis, base_model)
    if base_model_name is not None:
        source.said_base = said_of_basis(basis.base_model, base_model_name)
    elif check_base_model and not is_of(source.base_model, basis.info):
        own, other = str(source.base_model), str(basis.base_model)
        raise BasisMismatchError(
            f"{source.location}: trained on {own!r}, but the basis was built for {other!r}: {difference(own, other)}."
            f" Use a basis of the same base model. {REMEDY} check_base_model=False (--no-base-check) accepts any."
        )
    if part is not None and part not in (parts := parts_in(basis)):
        raise BasisMismatchError(
            f"part={part!r} (--part): the basis has no such part of a pipeline; it has {', '.join(parts) or 'none'}."
        )
    places = {name: key for name in source.keys if (key := basis.find(name, part)) is not None}
    absent = [name for name in source.keys if name not in places]
    if absent:
        raise BasisMismatchError(
            f"{source.location}: {len(absent)} of its modules are not in the basis, such as {names_of(absent, 3)}; it"
            f" has {names_of(basis, 3)}. Build a basis from sources that adapt these modules."
        )
    uses = Counter(places.values())
    twice = sorted(name for name, key in places.items() if uses[key] > 1)
    if twice:
        raise BasisMismatchError(
            f"{source.location}: its modules {names_of(twice, 3)} are one module of the basis ({places[twice[0]]}),"
            " leading parts of their names aside. Build a basis from sources that adapt both."
        )
    source.outer = _outer(source, places)
    cores = {}
    for name, key in places.items():
        update = source.factors(name)
        try:
            cores[key] = basis[key].project((update.B, update.A))
        except BasisMismatchError as error:
            raise BasisMismatchError(f"{source.location}: module {name!r}: {error}") from None
        source.norms.setdefault(name, update.norm())
    projection = _projection(source, basis, places, cores)
    if not any(source.norm(name) for name in places):
        raise SubspaceError(f"{source.location}: every lora_B is zero, so there is nothing to project.")
    return projection


def _projection(
    source: Source,
    basis: SubspaceBasis,
    places: dict[str, str],
    cores: Mapping[str, torch.Tensor],
) -> Projection:
    """Return the projection of a source's modules, by the cores of all modules of the basis."""
    shapes = basis.shapes()
    energy, random, norms = {}, {}, {}
    for name, key in places.items():
        shape = shapes[key]
        norms[key] = source.norm(name)
        energy[key] = share_of(float(cores[key].square().sum()), norms[key] ** 2)
        random[key] = shape["k_out"] * shape["k_in"] / (shape["out"] * shape["in"])
    own = {key: cores[key] for key in places.values()}
    return Projection(source, basis, own, energy, of_source(random, norms), of_source(energy, norms), places)


def _outer(source: Source, places: Mapping[str, str]) -> str:
    """Return what stands before the basis's names in all of a source's, "" where it is the adapted model's.

    The state dict of a model that holds the adapted one, such as a LightningModule, has its attribute's name in front.
    PEFT's own prefix marks where the adapted model begins; then what follows is that model's.
    """
    if source.parts or any(has_peft_prefix(key) for sides in source.keys.values() for key in sides.values()):
        return ""
    found = {name.removesuffix(key) if name.endswith(f".{key}") else "" for name, key in places.items()}
    return found.pop() if len(found) == 1 else ""


def _extras(source: Source) -> dict[str, torch.Tensor]:
    """Read the tensors that a task keeps as they are: of a LoRA's `modules_to_save`, and its whole embeddings.

    PEFT saves those of a model that was given further tokens, and loads them into the base model.
    """
    names = {key: source.plain(key) for key in source.other_keys}
    if source.pipeline:
        names = {key: split_part(name)[1] for key, name in names.items()}
    return {name: source.read(key).detach().cpu().contiguous() for key, name in names.items()}


def _check_extras(source: Source) -> None:
    """Raise `SubspaceError` where a LoRA has trained tensors that a task cannot hold."""
    saved = saved_modules(source.config)
    # the trained tokens themselves before the rest of their layer
    for key in sorted(source.other_keys, key=lambda key: not key.endswith("trainable_tokens_delta")):
        if not (is_saved_module(source.plain(key), source.config) or is_embedding(source.plain(key))):
            raise SubspaceError(
                f"{source.location}: {key} is neither a factor nor of its modules_to_save"
                f" ({', '.join(saved) or 'none'}). Where it was trained with the LoRA, a projected task cannot hold"
                " it, and without it the adapter is another: train without trainable_token_indices, with bias='none'."
                " Where it is the base model's own, as in a whole model's state dict, pass the adapter alone, as"
                " `get_peft_model_state_dict(model)` gives it."
            )
