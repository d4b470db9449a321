"""The arguments that recipes share, read from the command line, a YAML file and a preset."""

from __future__ import annotations

import dataclasses
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from subspace_peft.errors import SubspaceError

Arguments = TypeVar("Arguments")


def argument(default: Any, help: str) -> Any:
    """Return a dataclass field with its line in `--help`; a tuple is the default of a list."""
    if isinstance(default, tuple):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class CommonArguments:
    """The arguments of every recipe, whose own dataclass inherits from it, adds model and data, and sets defaults."""

    stage: Literal["sources", "basis", "train", "evaluate", "compare", "choose", "all"] = argument(
        "all", "what to do; all is everything but choose"
    )
    preset: str = argument("none", "values for other arguments; those given by hand win")
    dry_run: bool = argument(False, "print downloads, steps, trained parameters and bytes; fetch and train nothing")
    out: str = argument("output", "folder of everything that is made")
    task: str = argument("", "the held-out task")
    sources: list[str] = argument((), "source tasks, or adapters (folder or Hub id); all others by default")  # noqa: RUF009
    source_r: int = argument(8, "rank of the source adapters")
    source_examples: int = argument(10000, "at most so many training examples per source; 0: all")
    source_epochs: float = argument(5, "passes over them")
    source_rate: float = argument(5e-4, "learning rate of the source adapters")
    target_modules: list[str] = argument((), "adapted modules")  # noqa: RUF009
    layers: list[int] = argument((), "adapted layers; all by default")  # noqa: RUF009
    basis: str | None = argument(None, "use this basis (folder or Hub id) instead of building one")
    basis_k: int = argument(32, "directions per side of the basis that is built")
    builder: Literal["adapters", "eigenlora"] = argument("adapters", "how it is built, see build_basis")
    directions: int = argument(0, "direction tensors that it keeps, for --coefficients directions")
    coefficients: Literal["core", "factor", "diagonal", "directions", "none"] = argument(
        "core", "what is trained in the basis"
    )
    k: int | None = argument(None, "train in the leading k directions; all by default")
    extra_rank: int = argument(0, "directions of the task's own per module, trained beside the basis")
    own: list[int] = argument((1, 2, 4), "directions of the task's own that --stage choose tries beside the basis")  # noqa: RUF009
    standard_errors: float = argument(1.0, "by which --stage choose has a larger candidate win")
    test_others: bool = argument(False, "once --stage choose has chosen, test the other candidates as well")
    mean_gain: Literal["none", "fixed", "trainable"] = argument("none", "the fleet's mean update")
    r: int = argument(8, "rank of LoRA, and of the factor coefficients")
    alpha: float = argument(256.0, "scale of the coefficients, see SubspaceConfig")
    seed: int = argument(0, "of the source adapters, the random basis, --stage train and choose")
    seeds: list[int] = argument((1, 2, 3), "report seeds of --stage compare, whose sweeps use seed 0")  # noqa: RUF009
    sweep: int = argument(0, "try at most so many learning rates per method; 0: its own sweep")
    train_examples: int = argument(0, "training examples, drawn by the seed; 0: all")
    validation_examples: int = argument(400, "validation examples")
    test_examples: int = argument(0, "test examples; 0: all")
    epochs: float = argument(20, "passes over the training examples")
    batch: int = argument(16, "examples per step and process")
    rate: float = argument(4e-3, "learning rate of --stage train; compare sweeps its own")
    scheduler: str = argument("linear", "as TrainingArguments.lr_scheduler_type")
    warmup: float = argument(0.06, "share of the steps")
    weight_decay: float = argument(0.0, "of AdamW")
    bf16: bool = argument(False, "train in bfloat16")


class _Formatter(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    """Keeps a recipe's docstring as it is, and prints defaults."""


def parse_arguments(
    kind: type[Arguments],
    presets: Mapping[str, Mapping[str, Any]],
    typed: Sequence[str] | None = None,
    *,
    description: str | None = None,
) -> Arguments:
    """Read the dataclass `kind` with transformers' `HfArgumentParser`; it has the fields `preset` and `task`.

    A value given on the command line wins over one in the YAML file, which may come as the first argument; that over
    the preset's; that over the dataclass's default. In YAML and presets names have underscores.

    Args:
        kind: the dataclass; its fields' ``metadata={"help": …}`` is what `--help` prints.
        presets: name → values. A value that is a dict has one entry per task; a task without one gets the default.
        typed: `sys.argv[1:]` by default.
        description: printed above the help.

    Raises:
        SubspaceError: an unknown preset; a YAML file that is missing, no mapping, or names no argument.
        SystemExit: argparse's own, where a name or a value is not understood.
    """
    from transformers import HfArgumentParser

    given = list(sys.argv[1:] if typed is None else typed)
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if given and given[0].endswith((".yaml", ".yml")):
        # as if typed before the rest: then types and choices are checked in one place, and what is typed last wins
        given = [*_as_typed(Path(given[0]), defaults), *given[1:]]
    parser = HfArgumentParser(kind, description=description, formatter_class=_Formatter, allow_abbrev=False)
    preset = parser.parse_known_args(given)[0].preset
    if preset not in presets:
        raise SubspaceError(f"There is no preset {preset!r}; choose one of {', '.join(presets)}.")
    if unknown := sorted(set(presets[preset]) - set(defaults)):
        raise SubspaceError(f"The preset {preset!r} sets {', '.join(unknown)}, which is no argument.")
    parser.set_defaults(**presets[preset])
    namespace = parser.parse_args(given)
    values = vars(namespace)
    for name, value in values.items():
        if isinstance(value, dict):
            values[name] = value.get(values["task"], defaults[name])
    return kind(**values)


def quiet() -> None:
    """Silence transformers' and datasets' own bars and notices for this process: a recipe prints its own."""
    import warnings

    import datasets
    import transformers

    # PEFT's ask of transformers, at every adapter
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _as_typed(file: Path, known: Mapping[str, Any]) -> list[str]:
    """Return the YAML file's values as command-line arguments."""
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SubspaceError(f"{file} cannot be read as YAML: {error}") from None
    if not isinstance(values, dict):
        raise SubspaceError(f"{file} holds a {type(values).__name__}; give a mapping of arguments to values.")
    if unknown := sorted(str(name) for name in values if name not in known):
        raise SubspaceError(
            f"{file} sets {', '.join(unknown)}, which is no argument; there are {', '.join(sorted(known))}."
        )
    typed: list[str] = []
    for name, value in values.items():
        if isinstance(value, dict):
            raise SubspaceError(f"{file}: {name} is a mapping; give one value, or a list where several are meant.")
        if value is not None:
            typed += [f"--{name}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
    return typed
