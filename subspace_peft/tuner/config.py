"""`SubspaceConfig`: which basis, which coefficients."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from .._io.untrusted import read_json
from .._version import __version__
from ..basis import SubspaceBasis, resolve_basis
from ..basis.basis import note_location
from ..basis.resolve import require_same
from ..errors import BadFileError, BasisNotFoundError, NoConfigurationError, SubspaceError
from .config_check import check_choices, check_values, unknown_keys
from .registration import SUBSPACE

GENERATED = ("random", "base-weights")


@dataclass
class SubspaceConfig(PeftConfig):
    """Configuration of a task in a shared basis: ``ΔW = s · U (g·M/s + C(θ)) V``, of which only θ (and g) is trained.

    A relative `basis` is looked for beside the saved task first, then in the working directory.
    """

    basis: Any = field(
        default=None,
        metadata={
            "help": (
                "The shared basis: a `SubspaceBasis`, its folder, or its Hub id. 'random' (zero-mean Gaussian,"
                " orthonormalised) and 'base-weights' (top singular vectors of the base model's weights, LoRA-XS) make"
                " one at injection, of size `k`; it then travels in the task's own file."
            )
        },
    )
    basis_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit sha of a basis on the Hub."}
    )
    basis_fingerprint: str | None = field(
        default=None, metadata={"help": "sha256 that the basis must have. Filled in when the adapter is made."}
    )
    save_basis: bool | None = field(
        default=None,
        metadata={
            "help": (
                "Whether the task's own file carries its basis. None: only a basis that is stored nowhere else does."
            )
        },
    )
    coefficients: Literal["core", "factor", "diagonal", "directions", "none"] = field(
        default="core",
        metadata={
            "help": (
                "'core': C itself, k_out × k_in numbers per module. 'factor': C = up · down of rank `r`. 'diagonal': k"
                " numbers. 'directions': one number per direction tensor of the basis. 'none': only the mean core's"
                " gain."
            )
        },
    )
    k: int | None = field(
        default=None,
        metadata={
            "help": "How many of the basis's directions to use, the leading ones. None: all (16 for generated ones)."
        },
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={
            "help": "Another k for some modules: end of the name, or a regular expression for it → k, as in LoRA."
        },
    )
    r: int = field(default=8, metadata={"help": "Rank of the `factor` coefficients."})
    alpha: float = field(
        default=256.0,
        metadata={
            "help": (
                "Scale: s = alpha / √(how many numbers an Adam step moves C by), so that a step of learning rate η "
                "changes ΔW by at most alpha · η in Frobenius norm, whatever k and kind."
            )
        },
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input while training."})
    mean_gain: Literal["none", "fixed", "trainable"] = field(
        default="none",
        metadata={
            "help": (
                "The fleet's mean core M: 'none' leaves it out, 'fixed' adds it (g = 1), 'trainable' trains g per "
                "module, from 0."
            )
        },
    )
    start: str = field(
        default="zero",
        metadata={
            "help": (
                "Where training starts: 'zero' (the base model's function), 'mean' (the fleet's mean update), or the "
                "name of one of the basis's sources (its projection)."
            )
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of a generated 'random' basis."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Module names, a regular expression, or 'all-linear', as in LoRA. None: the basis's own modules."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave out, as in LoRA."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules that are trained and saved whole, such as a classifier."}
    )
    bias: str = field(
        default="none",
        metadata={
            "help": (
                "'none', 'all' or 'subspace_only' (of the adapted layers): biases of the base model that are trained"
                " too. As in LoRA, for one adapter only, and disabling the adapter then does not give the base model's"
                " outputs."
            )
        },
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Rows of the token embeddings that are trained whole, as in LoRA."}
    )
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices, as in LoRA."})
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers where it is not a usual one, as in LoRA."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Not supported: parameters that are no layer's weight, as in LoRA."}
    )
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "Whether targets are `Conv1D`. Filled in when the adapter is made."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "False draws small random coefficients instead of the start. For tests."}
    )
    check_base_model: bool = field(
        default=True, metadata={"help": "Refuse a base model other than the one the basis or the task belongs to."}
    )
    base_probe: list[float] | None = field(
        default=None,
        metadata={"help": "A few numbers computed from the base weights, by which a wrong base is noticed."},
    )
    basis_modules: dict[str, Any] | None = field(
        default=None, metadata={"help": "Shapes and hashes of the basis carried in the task's own file."}
    )
    weight_shapes: dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Shapes of the adapted weights of embeddings and convolutions. Filled in when the adapter is made."
        },
    )
    id2label: dict[int, str] | None = field(
        default=None, metadata={"help": "Names of the classes of the task's own head, by index. Kept, not used."}
    )
    bundle: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Which bundle the task was loaded from: location, commit, name and sha256. Filled in then."},
    )
    card: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": (
                "What the README says beside the other fields: base model's class, training, metrics, controls. Filled"
                " in when the task is saved, by `SubspaceCardCallback` and by `write_card`."
            )
        },
    )
    subspace_version: str | None = field(
        default=None, metadata={"help": "Version of subspace_peft that saved this file; None until it is saved."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SUBSPACE
        check_values(self)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        if self.layers_pattern and self.layers_to_transform is None:
            raise SubspaceError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")
        check_choices(self)
        if self.id2label is not None:
            # JSON makes texts of the indices
            self.id2label = {int(index): str(label) for index, label in self.id2label.items()}
        self._basis: SubspaceBasis | None = None
        self._plan: Any = None
        self._near: Path | None = None
        self._token: str | bool | None = None
        self._given = False
        self._file_modules: frozenset[str] | None = None
        self._place: Any = None
        self._recorded = False

    # -- the basis --------------------------------------------------------------------------------------------------

    @property
    def generated(self) -> bool:
        """Whether the basis is made at injection rather than built from a fleet."""
        return isinstance(self.basis, str) and self.basis in GENERATED

    @property
    def loaded(self) -> bool:
        """Whether this configuration was read from a saved task."""
        return self.subspace_version is not None

    # what PEFT's `hotswap_adapter` reads of every configuration, whatever the method, to compute each layer's scale
    use_rslora = False

    @property
    def lora_alpha(self) -> float:
        """s · r of a module that `alpha_pattern` does not name."""
        return self.alpha

    @property
    def alpha_pattern(self) -> dict[str, float]:
        """Per key of a loaded task's coefficients, as a regular expression, s · r: PEFT divides it by r."""
        from .task_file import scale_of

        known = self.basis_modules if self._basis is None else None
        pattern = {}
        for module in self._file_modules or ():
            name = module if self._basis is None else str(self._basis.find(module))
            shape = known[name]["shape"] if known is not None else self._basis.shapes()[name]  # type: ignore[union-attr]
            # the module itself too: PEFT warns of patterns that no module matches
            pattern[rf"{re.escape(module)}(\.subspace_coef\..*)?"] = scale_of(self, module, shape) * self.r
        return pattern

    def resolve(self) -> SubspaceBasis | None:
        """Find and verify the basis. None: it is to be generated, or lies in the task's own file.

        Raises:
            BasisNotFoundError: none is given, or it is nowhere.
            BasisMismatchError: the one found has another fingerprint; names both.
        """
        if self._basis is not None:
            return self._basis
        if isinstance(self.basis, SubspaceBasis):
            require_same(self.basis, self.basis_fingerprint, "This task")
            self._basis = self.basis
            note_location(self.basis)
        elif (self.basis_modules is not None and not self._given) or (self.generated and not self.loaded):
            return None
        elif self.basis is None and self.basis_fingerprint is None:
            raise BasisNotFoundError(
                "SubspaceConfig has no basis. Build one from LoRA adapters with `subspace_peft.build_basis([...])` or"
                " `subspace-peft build`, and pass it, its folder or its Hub id as basis=…; or ask for a random one"
                " with basis='random', k=16."
            )
        elif self._given:
            # said by hand: that place and no other, whatever this process or machine has seen before
            self._basis = SubspaceBasis.from_pretrained(
                str(self.basis), fingerprint=self.basis_fingerprint, token=self._token
            )
        else:
            self._basis = resolve_basis(
                None if self.basis is None or self.generated else str(self.basis),
                revision=self.basis_revision,
                fingerprint=self.basis_fingerprint,
                near=self._near,
                token=self._token,
            )
        return self._basis

    def adopt(self, basis: SubspaceBasis) -> None:
        """Take `basis` as the resolved one and record its fingerprint and, on the Hub, its commit."""
        self._basis = basis
        self.basis_fingerprint = basis.fingerprint
        if basis.revision is not None:
            self.basis_revision = basis.revision

    def start_over(self) -> None:
        """Forget the generated basis, and what was filled in with it, of the modules that it was made for."""
        self._basis = self.basis_fingerprint = self.basis_modules = self.base_probe = None

    # -- PEFT's own interface ---------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, with the basis as its location: a folder or a Hub id."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        basis = values["basis"]
        values["basis"] = (
            basis.location if isinstance(basis, SubspaceBasis) else (None if basis is None else str(basis))
        )
        return {
            key: sorted(value) if isinstance(value, set) else copy.deepcopy(value) for key, value in values.items()
        }

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's; where a task is saved, its README gets a card."""
        from .card import forget_others, write_section

        if self.save_basis and self.basis_modules is None and self._plan is not None:
            # asked for after the adapter was made: the tensors are in the task's file already, see SharedBuffers
            self.basis_modules = self._plan.describe()
        if isinstance(self.basis, SubspaceBasis):
            # it may have been saved or pushed since the adapter was made
            self.basis_revision = self.basis.revision
        before = self.subspace_version
        # a configuration that no adapter was made from is a wish, and loading it must not count as loading a task
        self.subspace_version = (
            __version__ if before is not None or self.base_probe is not None or self._plan else None
        )
        forget_others(Path(save_directory), self)
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.subspace_version = before
        if self.basis_fingerprint is not None:
            write_section(Path(save_directory), self)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """As PEFT's, which `from_pretrained` calls.

        Raises:
            BadFileError: no JSON object, a method that PEFT does not know, or keys that nobody writes into a saved
                task.
        """
        try:
            values = read_json(Path(path_json_file))
        except (OSError, ValueError) as error:
            raise BadFileError(
                f"{path_json_file}: no adapter's config ({error}). Fetch or save the adapter again."
            ) from error
        kind = values.get("peft_type", SUBSPACE)
        if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
            raise BadFileError(
                f"{path_json_file}: its peft_type is {str(kind)[:80]!r}, which this PEFT does not know. Upgrade PEFT,"
                " or fetch the adapter again."
            )
        unknown = unknown_keys(values, [item.name for item in fields(cls)]) if kind == SUBSPACE else []
        if unknown:
            raise BadFileError(
                f"{path_json_file}: it has {', '.join(unknown[:5])}, which neither the version that saved it nor this"
                " one knows. The file was altered: fetch it again, or take that out."
            )
        return super().from_json_file(path_json_file, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As PEFT's. `basis=` says where the basis is, if not where the task's config says;
        `check_base_model=False` tries another base model anyway.

        The task's tensors, where they lie beside the config, are checked against the basis here, before any model is
        touched.

        Raises:
            BadFileError: a truncated or malformed file, wrong dtypes, non-finite numbers. Of JSON that is no
                configuration it is a TypeError as well, as with PEFT's other methods.
            BasisNotFoundError, BasisMismatchError: see `resolve`; also where coefficients do not fit the basis.
        """
        from .task_file import check_task, locate_task

        basis, check = kwargs.pop("basis", None), kwargs.pop("check_base_model", None)
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except BadFileError:
            raise
        except (SubspaceError, TypeError, AttributeError, KeyError, ArithmeticError) as error:
            # PEFT's own methods raise a TypeError for JSON that is no configuration
            kind = NoConfigurationError if isinstance(error, TypeError) else BadFileError
            raise kind(
                f"{pretrained_model_name_or_path}: its adapter_config.json makes no configuration ({error}). Fetch or"
                " save the task again."
            ) from error
        if not isinstance(config, SubspaceConfig):
            return config
        if check is not None:
            config.check_base_model = check
        if basis is not None:
            config.basis, config.basis_revision, config._given = basis, None, True
        folder, weights = locate_task(pretrained_model_name_or_path, subfolder, kwargs)
        config._near = folder
        config._token = kwargs.get("token")
        if weights is not None:
            config._file_modules = check_task(weights, config)
        return config

    def __getstate__(self) -> dict[str, Any]:
        # a pickled config carries the basis's whereabouts, not its tensors
        state = dict(self.__dict__)
        state["_basis"] = state["_plan"] = state["_token"] = None
        if isinstance(state.get("basis"), SubspaceBasis) and state["basis"].location is not None:
            state["basis"] = state["basis"].location
        return state
