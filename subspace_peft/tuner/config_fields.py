"""The fields of `SubspaceConfig`, each with its type, default and text: the one place where they are declared."""

from __future__ import annotations

import textwrap
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, TypeVar

from peft.config import PeftConfig

from .loaded_from import LoadedFrom

T = TypeVar("T")


class Default(int):
    """A default that was not asked for, unlike the same value given."""


DEFAULT_R = Default(8)


def described(default: Any, text: str, **more: Any) -> Any:
    """Return a field of the configuration with its text.

    Args:
        default: its value where none is given, or the class that makes one.
        text: what it means; "Filled in" is said of those that a user need not set.
        **more: other arguments of `dataclasses.field`.
    """
    made = {"default_factory": default} if isinstance(default, type) else {"default": default}
    return field(**made, metadata={"help": text}, **more)


@dataclass
class ConfigFields(PeftConfig):
    """The fields that `SubspaceConfig` adds to PEFT's own; `SubspaceConfig` says what they mean together."""

    basis: Any = described(
        None,
        "The shared basis: a `SubspaceBasis`, its folder, or its Hub id. 'random' (zero-mean Gaussian,"
        " orthonormalised) and 'base-weights' (top singular vectors of the base model's weights, LoRA-XS) make"
        " one at injection, of size `k`; it then travels in the task's own file.",
    )
    basis_revision: str | None = described(None, "Branch, tag or commit sha of a basis on the Hub.")
    basis_fingerprint: str | None = described(
        None, "sha256 that the basis must have. Filled in when the adapter is made."
    )
    basis_part: str | None = described(
        None,
        "Which part of a pipeline the model is, such as 'text_encoder_2', where a pipeline's basis has modules"
        " of the same names for several, and shapes do not tell.",
    )
    basis_names: dict[str, str] | None = described(
        None,
        "Module of the model → its name in the basis, of modules that transformers has renamed since the basis"
        " was built, or that several parts of a pipeline have by that name. Filled in when the adapter is"
        " made.",
    )
    strict: bool = described(
        False,
        "Refuse a model that does not have all of the basis's modules, instead of adapting those that it has"
        " with a warning. Modules that target_modules, exclude_modules or layers_to_transform leave out are"
        " not asked for.",
    )
    save_basis: bool | None = described(
        None, "Whether the task's own file carries its basis. None: only a basis that is stored nowhere else does."
    )
    coefficients: Literal["core", "factor", "diagonal", "directions", "none"] = described(
        "core",
        "'core': C itself, k_out × k_in parameters per module. 'factor': C = up · down of rank `r`."
        " 'diagonal': k parameters. 'directions': one per direction tensor of the basis. 'none': only the mean"
        " core's gain.",
    )
    k: int | None = described(
        None, "How many of the basis's directions to use, the leading ones. None: all (16 for generated ones)."
    )
    rank_pattern: dict[str, int | list[int]] = described(
        dict,
        "Another k for some modules: end of the name, or a regular expression for it → k, as in LoRA; or"
        " → [k_out, k_in], where its two sides differ.",
    )
    extra_rank: int = described(
        0,
        "Directions of the task's own beside the basis, per module: u (out × extra_rank) and v (extra_rank ×"
        " in) are trained together with the coefficients, at the same learning rate, as a LoRA of that rank"
        " would be. 1 or 2 help a task that is unlike the basis's; 0: none.",
    )
    extra_rank_pattern: dict[str, int] = described(
        dict,
        "Another extra_rank for some modules, as in `rank_pattern`; 0 for none there. With extra_rank=0 only"
        " the modules named here have directions of the task's own.",
    )
    r: int = described(DEFAULT_R, "Rank of the `factor` coefficients.")
    alpha: float = described(
        256.0,
        "Scale: s = alpha / √(how many parameters an Adam step moves C by), so that a step of learning rate η"
        " changes ΔW by at most alpha · η in Frobenius norm, whatever k and kind. At 256, start from a"
        " learning rate of 3e-3, as with `TrainingArguments(learning_rate=3e-3)`: 1e-3 … 5e-3 were good for"
        " k = 8, 16 and 28, texts and images, and 1e-4 … 2e-2 is the measured range. Another alpha asks for"
        " 256 / alpha times that rate. The Trainer's default of 5e-5 is too low.",
    )
    dropout: float = described(0.0, "Dropout on the adapter's input while training.")
    mean_gain: Literal["none", "fixed", "trainable"] = described(
        "none",
        "The fleet's mean core M: 'none' leaves it out, 'fixed' adds it (g = 1), 'trainable' trains g per "
        "module, from 0.",
    )
    start: str = described(
        "zero",
        "Where training starts: 'zero' (the base model's function), 'mean' (the fleet's mean update), or the "
        "name of one of the basis's sources (its projection).",
    )
    seed: int = described(0, "Seed of a generated 'random' basis.")
    target_modules: list[str] | str | None = described(
        None, "Module names, a regular expression, or 'all-linear', as in LoRA. None: the basis's own modules."
    )
    exclude_modules: list[str] | str | None = described(None, "Modules to leave out, as in LoRA.")
    modules_to_save: list[str] | None = described(
        None, "Further modules that are trained and saved whole, such as a classifier."
    )
    bias: str = described(
        "none",
        "'none', 'all' or 'subspace_only' (of the adapted layers): biases of the base model that are trained"
        " too. As in LoRA, for one adapter only, and disabling the adapter then does not give the base model's"
        " outputs.",
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = described(
        None, "Rows of the token embeddings that are trained whole, as in LoRA."
    )
    layers_to_transform: list[int] | int | None = described(None, "Layer indices, as in LoRA.")
    layers_pattern: list[str] | str | None = described(
        None, "Name of the list of layers where it is not a usual one, as in LoRA."
    )
    target_parameters: list[str] | None = described(
        None, "Not supported: parameters that are no layer's weight, as in LoRA."
    )
    fan_in_fan_out: bool = described(False, "Whether targets are `Conv1D`. Filled in when the adapter is made.")
    init_weights: bool = described(True, "False draws small random coefficients instead of the start. For tests.")
    check_base_model: bool = described(
        True, "Refuse a base model other than the one the basis or the task belongs to."
    )
    base_probe: list[float] | None = described(
        None,
        "A few values computed from the base weights, by which a wrong base is noticed. Filled in when the"
        " adapter is made.",
    )
    base_weights: dict[str, Any] | None = described(
        None,
        "Some entries of the base weights, by which another base model is noticed. Filled in when the adapter"
        " is made.",
    )
    basis_modules: dict[str, Any] | None = described(
        None, "Shapes and hashes of the basis carried in the task's own file. Filled in when it is saved."
    )
    weight_shapes: dict[str, list[int]] | None = described(
        None, "Shapes of the adapted weights of embeddings and convolutions. Filled in when the adapter is made."
    )
    id2label: dict[int, str] | None = described(
        None, "Names of the classes of the task's own head, by index. Kept, not used."
    )
    bundle: dict[str, Any] | None = described(
        None, "Which bundle the task was loaded from: location, commit, name and sha256. Filled in then."
    )
    card: dict[str, Any] | None = described(
        None,
        "What the README says beside the other fields: base model's class, training, metrics, controls. Filled"
        " in when the task is saved, by `SubspaceCardCallback` and by `write_card`.",
    )
    subspace_version: str | None = described(
        None, "Version of subspace_peft that saved this file; None until it is saved."
    )
    loaded_from: LoadedFrom | None = described(
        None, "Where the task was read from. Filled in when it is loaded; not saved.", repr=False, compare=False
    )
    taken_basis: dict[str, Any] | None = field(
        default=None,
        init=False,
        repr=False,
        compare=False,
        metadata={
            "help": (
                "As `basis_modules`, of the tensors that PEFT has taken to save and whose configuration it saves next;"
                " empty where they have no basis. Filled in then; not saved."
            )
        },
    )

    filled_targets: Any = field(
        default=None,
        init=False,
        repr=False,
        compare=False,
        metadata={
            "help": (
                "What `target_modules` was filled in with when the adapter was made, where it was left out: it is then"
                " filled in again for another model. Not saved."
            )
        },
    )


def with_field_texts(cls: type[T]) -> type[T]:
    """Add a section ``Args`` to the docstring of a dataclass, with its fields' types, defaults and texts.

    ``python -OO`` leaves classes without a docstring, and so does this.
    """
    if cls.__doc__ is None:
        return cls
    told = [each for each in fields(cls) if each.init and "help" in each.metadata]
    # what a user sets stands first, what is PEFT's own and what is filled in comes after
    inherited = {each.name for each in fields(PeftConfig)}
    told.sort(key=lambda each: each.name in inherited or _filled_in(each))
    lines = ["    Args:"]
    for each in told:
        lines.append(f"        {each.name} (`{_type_of(each)}`, defaults to `{_default_of(each)}`):")
        lines += textwrap.wrap(each.metadata["help"], 119 - 12, initial_indent=" " * 12, subsequent_indent=" " * 12)
    before, raises, after = cls.__doc__.partition("    Raises:")
    cls.__doc__ = before + "\n".join(lines) + "\n" + (f"\n{raises}{after}" if raises else "    ")
    return cls


def changed_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that a user has set: those that are not at their defaults, by name."""
    shown = {each.name: each for each in fields(config) if each.repr and not _filled_in(each)}
    values = {name: getattr(config, name, None) for name in shown}
    return {name: value for name, value in values.items() if repr(value) != _default_of(shown[name])}


def _filled_in(each: Any) -> bool:
    return "Filled in" in each.metadata.get("help", "")


def _type_of(each: Any) -> str:
    return each.type if isinstance(each.type, str) else getattr(each.type, "__name__", str(each.type))


def _default_of(each: Any) -> str:
    return repr(each.default if each.default_factory is MISSING else each.default_factory())
