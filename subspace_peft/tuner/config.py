"""`SubspaceConfig`: which basis, which coefficients."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from peft.config import PeftConfig

from .._io.places import last_part
from .._shown import Shown, fingerprint, short
from .._version import __version__
from ..base_names import out_of_cache
from ..basis import BasisReference, SubspaceBasis, resolve_reference
from ..basis.base_notes import add_base_note
from ..basis.basis import note_location
from ..basis.dependents import add_dependent
from ..basis.module_names import unwrapped_in
from ..basis.recorded import recorded_place
from ..basis.resolve import require_same
from ..cards import Place
from ..errors import BasisNotFoundError, SubspaceError
from .card import card_for, coefficients_digest, place_of, unmeasured, write_section
from .config_check import check_choices, check_values
from .config_fields import DEFAULT_R as DEFAULT_R
from .config_fields import ConfigFields, changed_fields, with_field_texts
from .config_fields import Default as Default
from .config_file import naming_newer_version, read_config, read_fields, refuse_fields
from .loaded_from import LoadedFrom
from .peft_type import SUBSPACE
from .task_file import PICKLED_FILE, WEIGHTS_FILE, check_task, locate_task
from .task_sizes import TaskSizes

GENERATED = ("random", "base-weights")
NAMED = ("target_modules", "basis_modules", "basis_names", "weight_shapes")  # fields with names of modules
# true of one process only, like PEFT's own `runtime_config`
NOT_SAVED = ("loaded_from", "taken_basis", "filled_targets")
# saved only where they say something: earlier versions do not know them
SAVED_IF_SET = ("strict", "base_weights", "basis_names", "basis_part", "extra_rank", "extra_rank_pattern")


@with_field_texts
@dataclass(repr=False)
class SubspaceConfig(Shown, ConfigFields):
    """Configuration of a task in a shared basis: ``ΔW = U (g·M + s·C) V``, of which the core C (and g) is trained.

    With `extra_rank` the task has directions of its own beside the basis, ``+ s'·u v``, for what the basis lacks.

    Plain data: declared fields and checks. A relative `basis` is looked for beside the saved task first, then in the
    working directory. One configuration may be used for several adapters and models; fields that are "filled in when
    the adapter is made" then describe the last of them.

    Train with a learning rate of about 3e-3, as in ``TrainingArguments("out", learning_rate=3e-3)``: the Trainer's
    default, 5e-5, hardly moves the coefficients. AdamW's rates from 1e-4 to 2e-2 were measured to learn, 1e-3 … 5e-3
    best, at the default `alpha` of 256; at another `alpha`, multiply them by 256 / alpha. A rate outside that range is
    warned of when training begins.

    Examples:
        >>> from peft import get_peft_model
        >>> from subspace_peft import SubspaceConfig
        >>> model = get_peft_model(base_model, SubspaceConfig(basis="my-basis", task_type="SEQ_CLS"))

    Raises:
        SubspaceError: a value is of a wrong kind or size, or does not go with another; names it.
    """

    _joint = "="

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SUBSPACE
        self.taken_basis = self.filled_targets = None
        check_values(vars(self))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        if self.layers_pattern and self.layers_to_transform is None:
            raise SubspaceError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")
        check_choices(vars(self))
        # as JSON gives it back, so that the same sizes compare as equal
        self.rank_pattern = {key: k if isinstance(k, int) else list(k) for key, k in self.rank_pattern.items()}
        if self.id2label is not None:
            # JSON makes texts of the indices
            self.id2label = {int(index): str(label) for index, label in self.id2label.items()}

    def _shown_facts(self) -> Iterable[tuple[str, Any]]:
        # what is at its default is left out, as is what PEFT fills in alike for all
        for name, value in changed_fields(self).items():
            if name not in ("peft_type", "peft_version"):
                if isinstance(value, SubspaceBasis):
                    value = value.location or f"SubspaceBasis {fingerprint(value.fingerprint)}"
                yield name, short(repr(value))
        # of what is filled in when the adapter is made, the one that tells configurations apart
        if self.basis_fingerprint is not None and not isinstance(self.basis, SubspaceBasis):
            yield "basis_fingerprint", repr(fingerprint(self.basis_fingerprint))

    # -- facts that follow from the fields --------------------------------------------------------------------------

    @property
    def generated(self) -> bool:
        """Whether the basis is made at injection rather than built from a fleet."""
        return isinstance(self.basis, str) and self.basis in GENERATED

    @property
    def loaded(self) -> bool:
        """Whether this configuration was read from a saved task."""
        return self.subspace_version is not None

    @property
    def sizes(self) -> TaskSizes:
        """The fields that decide the trained tensors' sizes and scale."""
        return TaskSizes(
            self.coefficients,
            self.k,
            self.rank_pattern,
            self.r,
            self.alpha,
            self.mean_gain,
            self.extra_rank,
            self.extra_rank_pattern,
            # of a convolution's weight four sizes are noted
            frozenset(name for name, shape in (self.weight_shapes or {}).items() if len(shape) == 2),
        )

    @property
    def basis_reference(self) -> BasisReference:
        """Where the basis is to be found, and which one it has to be."""
        origin = self.loaded_from or LoadedFrom()
        return BasisReference(
            location=None if self.generated else self._location(),
            revision=self.basis_revision,
            fingerprint=self.basis_fingerprint,
            near=origin.folder,
            token=origin.token,
            exact=origin.basis_given and self.basis is not None,
        )

    def _location(self) -> str | None:
        basis = self.basis.location if isinstance(self.basis, SubspaceBasis) else self.basis
        return None if basis is None else str(basis)

    @property
    def fills_targets(self) -> bool:
        """Whether the targets are left to be filled in, or were filled in and not changed since."""
        return self.target_modules is None or self.target_modules == self.filled_targets

    # what PEFT's `hotswap_adapter` reads of every configuration, whatever the method, to compute each layer's scale
    use_rslora = False

    @property
    def lora_alpha(self) -> float:
        """The product s · r of a module that `alpha_pattern` does not name."""
        return self.alpha

    @property
    def alpha_pattern(self) -> dict[str, float]:
        """Per key of a loaded task's coefficients, as a regular expression, s · r: PEFT divides it by r."""
        shapes = (self.loaded_from or LoadedFrom()).modules or {}
        # the module itself too: PEFT warns of patterns that no module matches
        return {
            rf"{re.escape(module)}(\.subspace_coef\..*)?": self.sizes.scale(module, shape) * self.r
            for module, shape in shapes.items()
        }

    def resolve(self) -> SubspaceBasis | None:
        """Find and verify the basis. Nothing is kept: a model, once it uses the basis, holds it.

        Returns:
            The basis; None where it is to be generated, or lies in the task's own file.

        Raises:
            BasisNotFoundError: none is given, or it is nowhere.
            BasisMismatchError: the one found has another fingerprint; names both.
        """
        basis = self._found()
        return basis if basis is None or not self.basis_names else basis.named(self.basis_names)

    def _found(self) -> SubspaceBasis | None:
        if isinstance(self.basis, SubspaceBasis):
            require_same(self.basis, self.basis_fingerprint, "This task")
            note_location(self.basis)
            return self.basis
        reference = self.basis_reference
        if self.generated and not self.loaded:
            return None
        if self.basis_modules is not None and not reference.exact and (self.loaded or self.basis is None):
            return None
        if self.basis is None and self.basis_fingerprint is None:
            raise BasisNotFoundError(
                "SubspaceConfig has no basis. Build one from LoRA adapters with `subspace_peft.build_basis([...])` or"
                " `subspace-peft build`, and pass it, its folder or its Hub id as basis=…; or ask for a random one"
                " with basis='random', k=16."
            )
        return resolve_reference(reference)

    # -- PEFT's own interface ---------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are saved, as PEFT's does, with the basis as its location: a folder or a Hub id."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in NOT_SAVED}
        values["basis"] = self._location()
        # PEFT's task types append their heads at each loading
        if isinstance(self.modules_to_save, (list, tuple)):
            values["modules_to_save"] = list(dict.fromkeys(self.modules_to_save))
        values["base_model_name_or_path"] = out_of_cache(self.base_model_name_or_path)
        # wrappers around the model, such as torch.compile's, are none of its own names
        for name in NAMED:
            values[name] = unwrapped_in(values[name])
        return {
            key: sorted(value) if isinstance(value, set) else copy.deepcopy(value)
            for key, value in values.items()
            if value or key not in SAVED_IF_SET
        }

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` as PEFT's does; where a task is saved, its README gets a card."""
        folder = Path(save_directory)
        if isinstance(self.basis, SubspaceBasis):
            # it may have been saved or pushed since the adapter was made
            self.basis_revision = self.basis.revision
        self.card = card_for(self.card, coefficients_digest(folder / WEIGHTS_FILE))
        # what is written describes the tensors beside it, and the adapter's own configuration stays as it is
        own, taken, self.taken_basis = self.basis_modules, self.taken_basis, None
        if taken is not None:
            self.basis_modules = taken or None
        # a configuration that no adapter was made from is a wish, and loading it must not count as loading a task
        made = self.base_probe is not None or self.basis_modules is not None
        made = made or any((folder / name).is_file() for name in (WEIGHTS_FILE, PICKLED_FILE))
        before = self.subspace_version
        self.subspace_version = __version__ if before is not None or made else None
        try:
            written = self.write(folder, place_of(folder), **kwargs)
        finally:
            self.subspace_version, self.basis_modules = before, own
        if self.basis_fingerprint is not None:
            if before is None and not self.generated and self.base_weights is not None:
                # a task that was trained here: from now on its basis belongs to these weights on this machine
                add_base_note(self.basis_fingerprint, self.base_weights)
            write_section(folder, {**written, "subspace_version": before})
        self._note(folder, self.basis_modules)

    def write(self, folder: Path, place: Place, **kwargs: Any) -> dict[str, Any]:
        """Write `adapter_config.json` without a path of this machine: the basis's is relative to the task's folder.

        Args:
            folder: the folder to write into.
            place: where the task will be loaded from, which is another folder where `folder` is a scratch one.
            kwargs: as in PEFT's `save_pretrained`.

        Returns:
            The fields as they were written.
        """
        basis, fingerprint, bundle = self.basis, self.basis_fingerprint, self.bundle
        if not self.generated:
            self.basis, self.basis_fingerprint = self._recorded(place.folder)
        if isinstance(bundle, Mapping) and bundle.get("revision") is None and isinstance(bundle.get("location"), str):
            self.bundle = {**bundle, "location": last_part(bundle["location"])}
        try:
            super().save_pretrained(str(folder), **kwargs)
            return self.to_dict()
        finally:
            self.basis, self.basis_fingerprint, self.bundle = basis, fingerprint, bundle

    def _recorded(self, folder: Path | None) -> tuple[str | None, str | None]:
        origin, revision = self.loaded_from or LoadedFrom(), self.basis_revision
        if isinstance(self.basis, SubspaceBasis):
            revision = self.basis.revision
        return recorded_place(self._location(), revision, self.basis_fingerprint, folder=folder, near=origin.folder)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read a configuration's file, as PEFT's does, which `from_pretrained` calls.

        Raises:
            BadFileError: no JSON object, a method that PEFT does not know, or keys that no version writes into a
                saved task.
        """
        known = [item.name for item in fields(cls) if item.name not in NOT_SAVED]
        read = super().from_json_file
        return read_fields(path_json_file, known, lambda: read(path_json_file, **kwargs))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Load a task's configuration, as PEFT's does.

        The task's tensors, where they lie beside the config, are checked against the basis here, before any model is
        touched.

        Args:
            pretrained_model_name_or_path: folder or Hub id of the task.
            subfolder: in it.
            kwargs: as PEFT's. `basis` says where the basis is, if not where the task's config says: that place and no
                other, whatever this process or machine has seen before. `check_base_model=False` tries another base
                model anyway.

        Raises:
            BadFileError: a truncated or malformed file, wrong dtypes, non-finite values. Of JSON that is no
                configuration it is a TypeError as well, as with PEFT's other methods.
            BasisNotFoundError: see `resolve`.
            BasisMismatchError: see `resolve`; also where coefficients do not fit the basis.
            HubUnavailableError: the Hub does not answer.
            SubspaceError: another field is given, which the saved one would overrule.
        """
        basis, check = kwargs.pop("basis", None), kwargs.pop("check_base_model", None)
        inherited = {item.name for item in fields(PeftConfig)}
        refuse_fields([item.name for item in fields(cls) if item.name not in inherited], kwargs)
        read = super().from_pretrained
        config = read_config(
            str(pretrained_model_name_or_path),
            subfolder,
            kwargs.get("revision"),
            lambda: read(pretrained_model_name_or_path, subfolder=subfolder, **kwargs),
        )
        if not isinstance(config, SubspaceConfig):
            return config
        if check is not None:
            config.check_base_model = check
        folder, weights = locate_task(pretrained_model_name_or_path, subfolder, kwargs)
        config.loaded_from = LoadedFrom(folder, kwargs.get("token"))
        config._note(Path(pretrained_model_name_or_path, subfolder or ""), config.basis_modules)
        config.card = unmeasured(config.card)
        if basis is not None:
            config = config.on_basis(basis)
        if weights is not None:
            with naming_newer_version(config.subspace_version):
                modules = check_task(
                    weights, config.sizes, config.basis_reference, config.basis_modules, config.resolve
                )
            config.loaded_from = replace(config.loaded_from, modules=modules)
        return config

    def _note(self, folder: Path, carried: Any) -> None:
        """Note that the task in `folder`, of this machine, needs its basis, unless it carries it."""
        scratch = folder.name.startswith(".") and folder.name.endswith(".partial")
        if carried is None and not scratch and (folder / WEIGHTS_FILE).is_file():
            add_dependent(self.basis_fingerprint, folder)

    def on_basis(self, basis: SubspaceBasis | str | Path) -> SubspaceConfig:
        """Return a copy that takes its basis from `basis`, and from nowhere else.

        Args:
            basis: the basis, its folder or its Hub id.
        """
        origin = replace(self.loaded_from or LoadedFrom(), basis_given=True)
        return replace(self, basis=basis, basis_revision=None, loaded_from=origin)

    def adopt(self, basis: SubspaceBasis) -> None:
        """Take `basis` from here on. Deprecated: `on_basis` returns a configuration that does."""
        _warn_of_method("adopt(basis)", "config = config.on_basis(basis)")
        self.__dict__.update(vars(self.on_basis(basis)))
        self.basis_fingerprint, self.basis_revision = basis.fingerprint, basis.revision

    def start_over(self) -> None:
        """Forget what was filled in when the adapter was made. Deprecated: make a configuration, or use `on_basis`."""
        _warn_of_method("start_over()", "a new SubspaceConfig, or config.on_basis(…),")
        self.basis_fingerprint = self.basis_modules = self.base_probe = self.base_weights = None

    def __getstate__(self) -> dict[str, Any]:
        # a pickled config carries where a stored basis is, not its tensors
        state = {**self.__dict__, "taken_basis": None}
        if isinstance(self.basis, SubspaceBasis) and self.basis.location is not None:
            state["basis"] = self.basis.location
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        # a config that an earlier version pickled may lack a field, and has attributes that are none
        self.__dict__.update(dict.fromkeys((*NOT_SAVED, *SAVED_IF_SET)), strict=False)
        known = {item.name for item in fields(self)}
        self.__dict__.update({name: value for name, value in state.items() if name in known})


def _warn_of_method(old: str, new: str) -> None:
    warnings.warn(f"SubspaceConfig.{old} will go: use {new} instead.", FutureWarning, stacklevel=3)
