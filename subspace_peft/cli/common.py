"""Small things that several verbs share. Imports happen inside."""

from __future__ import annotations

import json
import math
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .._io.progress import begin
from .._lazy import collecting_later
from ..errors import HubUnavailableError, SubspaceError
from ..hub import looks_like_path, only_local
from ..hub_requests import ask
from .parsers import BASE, OUTPUT, SOURCES, grouped

Add = Callable[..., ArgumentParser]  # argparse's `add_parser`

DTYPES = ["float32", "bfloat16", "float16", "float64"]
BASE_MODEL_HELP = "model id or folder, to convert DoRAs and adapters that are no LoRA"
ALLOW_BIN_HELP = "read pickled adapter_model.bin too, weights_only"


BASE_MODEL_NAME_HELP = "the one base model that all adapters are of, whatever name their configs give it"


def add_base_model_name(verb: ArgumentParser) -> None:
    """Add the flag that says of which base model adapters are."""
    grouped(verb, BASE).add_argument("--base-model-name", metavar="NAME", help=BASE_MODEL_NAME_HELP)


def add_base_model(verb: ArgumentParser, help: str = BASE_MODEL_HELP, **more: Any) -> None:
    """Add the flag of the base model itself."""
    grouped(verb, BASE).add_argument("--base-model", metavar="MODEL", help=help, **more)


def add_basis(verb: ArgumentParser, help: str, **more: Any) -> None:
    """Add the flag that names a basis."""
    grouped(verb, SOURCES).add_argument("--basis", metavar="BASIS", help=help, **more)


def add_reading(verb: ArgumentParser) -> None:
    """Add the flags of what may be read as a LoRA beside one."""
    add_base_model(verb)
    grouped(verb, SOURCES).add_argument("--allow-bin", action="store_true", help=ALLOW_BIN_HELP)


def add_no_base_check(verb: ArgumentParser) -> None:
    """Add the flag that accepts adapters of other base models."""
    grouped(verb, BASE).add_argument(
        "--no-base-check", action="store_true", help="accept adapters whose base model has another name"
    )


def add_json(verb: ArgumentParser) -> None:
    """Add the flag that prints the result as JSON."""
    grouped(verb, OUTPUT).add_argument("--json", action="store_true", help="print the result as JSON")


def add_out(verb: ArgumentParser, help: str, **more: Any) -> None:
    """Add the flag of the folder to be written."""
    grouped(verb, OUTPUT).add_argument("--out", metavar="FOLDER", help=help, type=_place, **more)


def _place(text: str) -> str:
    """Return a place to write to. An empty one is the working directory to Python, and an unset variable to a user."""
    if not text.strip():
        raise ArgumentTypeError("it is empty, as where a variable is not set. Give a folder; '.' is this one")
    return text


def add_force(verb: ArgumentParser, what: str = "such as another basis, a LoRA or a bundle") -> None:
    """Add the flag that lets what lies in the folder to be written be replaced."""
    grouped(verb, OUTPUT).add_argument("--force", action="store_true", help=f"replace what else lies in --out, {what}")


def base_model(name: str | None) -> Any:
    """Load a base model by its id or folder; None where there is no name.

    Raises:
        SubspaceError: there is something else.
    """
    if not name:
        return None
    # a single name, such as gpt2, may be the Hub's
    if not Path(name).expanduser().exists() and (looks_like_path(name) or ("/" in name and only_local(name))):
        raise SubspaceError(
            f"--base-model {name}: there is no such folder. Give a model's folder, or its id on the Hub."
        )
    begin(f"loading the base model {name}")
    with collecting_later():
        from transformers import AutoModel

    try:
        return ask(name, lambda: AutoModel.from_pretrained(name))
    except HubUnavailableError:
        raise
    except ValueError as error:  # what is no model at all, unlike a place where nothing is, which is an OSError
        said = " ".join(str(error).split())
        raise SubspaceError(f"--base-model {name}: no model can be loaded from it ({said}).") from error


def said_of_conversion(kind: str | None, lost: float) -> str:
    """Return what a line says of an adapter's conversion to a LoRA; nothing where it was one."""
    return "" if kind is None else f"; converted from {kind}, which lost {lost:.2e} of its energy"


def unfinished(out: str | Path) -> Path | None:
    """Return the folder where finished modules are kept until all of `out` is written: ``<out>.partial``.

    None where `out` has no name.
    """
    out = Path(out).expanduser()
    return out.with_name(f"{out.name}.partial") if out.name else None


def earlier_record(out: str | Path) -> dict[str, Any]:
    """Return the config of the basis that lies in `out`; empty where none does, or it cannot be read."""
    from .._io.untrusted import read_json

    try:
        return read_json(Path(out).expanduser() / "basis_config.json")
    except (OSError, ValueError):
        return {}


@contextmanager
def kept_for_force(beside: Path | None) -> Iterator[None]:
    """Let an error of what lies in ``--out`` say that nothing is lost: finished modules are kept in `beside`."""
    from ..errors import OccupiedError

    try:
        yield
    except OccupiedError as error:
        kept = "" if beside is None or not beside.is_dir() else f" The finished modules are kept in {beside}:"
        again = f"{kept} the same command goes on from them, with --force or another --out." if kept else ""
        raise OccupiedError(f"{error}{again}") from error


def refuse_idle(args: Any, flag: str, why: str) -> None:
    """Raise `SubspaceError` where a flag was given that would do nothing.

    Args:
        args: the verb's arguments.
        flag: the flag, such as ``--force``.
        why: why it does nothing, and the remedy.
    """
    if getattr(args, flag.lstrip("-").replace("-", "_")) not in (None, False):
        raise SubspaceError(f"{flag} has no effect {why}. Leave it out.")


def print_json(facts: Any) -> int:
    """Print JSON; returns the exit status 0. What has no number, such as a share of nothing, is null."""
    print(json.dumps(_json(facts), indent=2, allow_nan=False))
    return 0


def _json(value: Any) -> Any:
    """Return a value in JSON's types.

    Raises:
        TypeError: it has none, which is a fault of the verb.
    """
    if isinstance(value, dict):
        return {str(key): _json(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r}: a {type(value).__name__} is no value of JSON")


def print_table(facts: dict[str, Any]) -> None:
    """Print names and values in two columns."""
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key:<{width}}  {value}")
