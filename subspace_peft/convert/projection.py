"""The projection of a LoRA onto a shared basis: its coefficients, what the basis keeps, and the task that it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .._shown import Shown, Table, fingerprint, said_of_directions, short
from ..basis import SubspaceBasis
from ..basis.overwriting import check_target
from ..basis.pipeline_parts import split_part
from ..energy import of_source, percent, share_of, word
from ..errors import SubspaceError
from ..sources import Source
from ..sources.lora import saved_modules

if TYPE_CHECKING:
    from ..tasks.read import SavedTask
    from ..tuner import SubspaceConfig
    from .joint import JointFit

# PEFT is for tasks: measuring what a basis keeps of a LoRA does without, and is done in a tenth of the time


@dataclass(frozen=True, eq=False, repr=False)
class Projection(Shown):
    """A LoRA's coefficients in a basis.

    Attributes:
        source: The LoRA.
        basis: The basis.
        cores: Module of the basis → C (k_out, k_in) float64, the least-squares optimum: the projection ``Uᵀ ΔW Vᵀ``;
            in a module with own directions ``Uᵀ (ΔW − B A) Vᵀ``, the best beside them.
        energy: Module of the basis → ‖Uᵀ ΔW Vᵀ‖² / ‖ΔW‖², the share that the basis alone keeps (1 for a module whose
            ΔW is zero), with or without own directions.
        energy_random: The share that a random basis of the same size keeps on average.
        energy_kept: The share over all modules together, which the basis alone keeps.
        places: Module of the LoRA → module of the basis.
        own: Module of the basis → ``(B, A)``, (out, φ) and (φ, in) float64, of the task's own directions. Modules that
            have none are left out; see `project_lora`.
        energy_both: Module of the basis → 1 − ‖ΔW − U C V − B A‖² / ‖ΔW‖², the share that the basis and own directions
            keep together. Modules without own directions are left out.
    """

    source: Source
    basis: SubspaceBasis
    cores: dict[str, torch.Tensor]
    energy: dict[str, float]
    energy_random: float
    energy_kept: float
    places: dict[str, str]
    own: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    energy_both: dict[str, float] = field(default_factory=dict)

    def _shown_facts(self) -> Iterator[tuple[str, Any]]:
        yield "source", short(self.source.location)
        yield "modules", len(self.cores)
        verdict = f" ({self.verdict})"
        yield "energy kept", percent(self.energy_kept) + ("" if self.own else verdict)
        yield "by a random basis", percent(self.energy_random)
        yield "with own directions", percent(self.energy_with_own) + verdict if self.own else None
        yield "own directions", said_of_directions(self.own_directions) if self.own else None
        yield "basis", fingerprint(self.basis.fingerprint)

    def _shown_table(self) -> Table:
        rows = (
            (name, percent(each), *([percent(self.energy_own[name]), self.own_directions[name]] if self.own else []))
            for name, each in self.energy.items()
        )
        more = ("in own directions", "own directions") if self.own else ()
        return ("module", "energy kept", *more), rows, len(self.energy)

    def with_fits(self, fits: Mapping[str, JointFit]) -> Projection:
        """Return the projection with own directions and the cores that go with them.

        Args:
            fits: Module of the basis → the fit of both together.
        """
        norms = {place: self.source.norm(name) for name, place in self.places.items()}
        return replace(
            self,
            cores=self.cores | {place: fit.core for place, fit in fits.items()},
            own={place: fit.own for place, fit in fits.items()},
            # nothing is lost of an update that is zero
            energy_both={
                place: 1 - fit.lost[-1] / norms[place] ** 2 if norms[place] else 1.0 for place, fit in fits.items()
            },
        )

    @property
    def own_directions(self) -> dict[str, int]:
        """Module of the basis → how many directions of its own the task has there."""
        return {name: self.own[name][0].shape[1] if name in self.own else 0 for name in self.cores}

    @property
    def energy_own(self) -> dict[str, float]:
        """Module of the basis → the share of ‖ΔW‖² that own directions add to what the basis alone keeps."""
        # stored bases are orthonormal to float32's precision, so the basis may seem to keep a little more
        return {place: max(0.0, self.energy_both.get(place, kept) - kept) for place, kept in self.energy.items()}

    @property
    def energy_with_own(self) -> float:
        """The share over all modules that the basis and the task's own directions keep together."""
        if not self.own:
            return self.energy_kept
        norms = {place: self.source.norm(name) for name, place in self.places.items()}
        return of_source({place: self.energy[place] + share for place, share in self.energy_own.items()}, norms)

    @property
    def own_parameters(self) -> int:
        """The parameters of the task's own directions, out + in for each."""
        return sum(B.numel() + A.numel() for B, A in self.own.values())

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
        places = {name: self.places[name] for name in keys}
        directions = {place: self.own[place] for place in places.values() if place in self.own}
        both = {place: self.energy_both[place] for place in directions}
        part = projection_of(own, self.basis, places, self.cores, self.energy)
        return replace(part, own=directions, energy_both=both)

    @property
    def relative_error(self) -> float:
        """‖ΔW − U C V − B A‖ / ‖ΔW‖ over all modules, where B A is of the task's own directions."""
        return math.sqrt(max(0.0, 1 - self.energy_with_own))

    @property
    def verdict(self) -> str:
        """Class of the energy kept, own directions included: ``faithful``, ``partial`` or ``poor``.

        Measure the task's own score before relying on it.
        """
        return word(self.energy_with_own)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the tensors, as JSON values."""
        return {
            "source": self.source.location,
            "basis": self.basis.location,
            "fingerprint": self.basis.fingerprint,
            "energy_kept": self.energy_kept,
            "energy_random": self.energy_random,
            "energy_with_own": self.energy_with_own,
            "own_directions": self.own_directions,
            "own_parameters": self.own_parameters,
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
        from ..tasks.write import planned_task, task_tensors, write_task

        if len(parts := self.parts) > 1:
            tasks = {part: projection.as_task() for part, projection in parts.items()}
            for part, task in tasks.items():
                check_target(Path(folder, part), planned_task(task.config), overwrite=overwrite)
            for part, task in tasks.items():
                write_task(Path(folder, part), task.config, task_tensors(task), overwrite=overwrite)
            return Path(folder)
        task = self.as_task()
        return write_task(folder, task.config, task_tensors(task), overwrite=overwrite)

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
            {name: self.own[key] for name, key in keys.items() if key in self.own},
        )

    def _config(self, keys: dict[str, str]) -> SubspaceConfig:
        from ..tuner import SubspaceConfig
        from ..tuner.module_names import other_names
        from ..tuner.own_directions import own_fields

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
            **own_fields({name: self.own_directions[key] for name, key in keys.items()}),
            **kept,
        )
        config.basis_names = other_names(self.basis, keys)
        shapes = {self.source.split(key)[1]: self.source.weight_shape(key) for key in self.source.keys}
        config.weight_shapes = {name: shape for name, shape in shapes.items() if shape is not None} or None
        return config


def projection_of(
    source: Source,
    basis: SubspaceBasis,
    places: dict[str, str],
    cores: Mapping[str, torch.Tensor],
    kept: Mapping[str, float] | None = None,
) -> Projection:
    """Return the projection of a source's modules, by the cores of all modules of the basis.

    Args:
        source: The source.
        basis: The basis.
        places: Module of the source → module of the basis.
        cores: Module of the basis → core.
        kept: Module of the basis → the share that the basis alone keeps; None where the cores are the projection's.
    """
    shapes = basis.shapes()
    energy, random, norms = {}, {}, {}
    for name, key in places.items():
        shape = shapes[key]
        norms[key] = source.norm(name)
        energy[key] = share_of(float(cores[key].square().sum()), norms[key] ** 2) if kept is None else kept[key]
        random[key] = shape["k_out"] * shape["k_in"] / (shape["out"] * shape["in"])
    own = {key: cores[key] for key in places.values()}
    return Projection(source, basis, own, energy, of_source(random, norms), of_source(energy, norms), places)


def _extras(source: Source) -> dict[str, torch.Tensor]:
    """Read the tensors that a task keeps as they are: of a LoRA's `modules_to_save`, and its whole embeddings.

    PEFT saves those of a model that was given further tokens, and loads them into the base model.
    """
    names = {key: source.plain(key) for key in source.other_keys}
    if source.pipeline:
        names = {key: split_part(name)[1] for key, name in names.items()}
    return {name: source.read(key).detach().cpu().contiguous() for key, name in names.items()}
