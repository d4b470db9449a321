"""Shell blocks: each line's commands, and what is wrong with them."""

from __future__ import annotations

import argparse
import contextlib
import glob
import io
import re
import shlex
import warnings
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

from subspace_peft.cli.language import verbs_of
from subspace_peft.cli.main import _parsed, main, parser

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
OPERATORS = ("&&", "||", "|", ";", "&")
# these need another machine, the Hub, or minutes; `cache rm` would find nothing in a test's own cache
NOT_RUN = ("push", "demo", "run", "cache rm")
# options that name what a command reads; the rest are names, values, and what it writes
READ = ("basis", "fleet", "tasks", "config", "from_config", "old_basis", "like", "with_", "facts")


def commands(source: str) -> Iterator[list[str]]:
    """Yield the words of each command of a block."""
    for line in source.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word not in OPERATORS:
                words.append(word)
                continue
            if words:
                yield words
            words = []


def after_program(words: list[str]) -> list[str] | None:
    """Return the arguments of `subspace-peft` in a command, whoever launches it; None in another command."""
    words = [word for at, word in enumerate(words) if not (_is_setting(word) and all(map(_is_setting, words[:at])))]
    if words[:1] == ["subspace-peft"]:
        return words[1:]
    # python -m subspace_peft, accelerate launch … -m subspace_peft
    for at in range(len(words) - 1):
        if words[at] == "-m" and words[at + 1] == "subspace_peft":
            return words[at + 2 :]
    return None


def _is_setting(word: str) -> bool:
    return re.match(r"\w+=", word) is not None


def check_other(words: list[str]) -> list[str] | None:
    """Return the faults of a command of another program; None where nothing of it is ours to check."""
    if words[0] == "make":
        return [f"make has no target {word}" for word in words[1:] if word not in make_targets() and "=" not in word]
    if words[0] == "pip" or words[:3] in (["python", "-m", "pip"], ["uv", "pip", "install"]):
        return _pip(words)
    script = next((word for word in words if re.match(r"(\./)?(recipes|benchmarks|docs)/[\w/]+\.py$", word)), None)
    return None if script is None else _script(script, words[words.index(script) + 1 :])


@cache
def make_targets() -> set[str]:
    """Return the targets of the Makefile."""
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@cache
def extras() -> set[str]:
    """Return the extras of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return set(project["optional-dependencies"])


def _pip(words: list[str]) -> list[str]:
    faults = []
    for word in words:
        # ".[demo]", "subspace-peft[report]", subspace_peft-0.1-py3-none-any.whl[trl]
        found = re.match(r"(\.|subspace[-_]peft\S*?|dist/\S+?)\[([\w,-]+)\]$", word)
        if found:
            faults += [f"pyproject.toml has no extra {name}" for name in found[2].split(",") if name not in extras()]
    for flag, file in pairwise(words):
        if flag in ("-c", "--constraint", "-r", "--requirement") and not (ROOT / file).is_file():
            faults.append(f"there is no file {file}")
    return faults


def _script(script: str, arguments: list[str]) -> list[str]:
    file = ROOT / script
    if not file.is_file():
        return [f"there is no script {script}"]
    known = _help_of(file) if script.removeprefix("./").startswith("recipes/") else file.read_text(encoding="utf-8")
    flags = [word.split("=")[0] for word in arguments if word.startswith("--")]
    return [f"{script} has no {flag}" for flag in flags if not re.search(rf"{flag}(?![\w-])", known)]


@cache
def _help_of(recipe: Path) -> str:
    from subspace_peft.recipes import load_recipe

    said = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(said):
        load_recipe(recipe.stem).main(["--help"])
    return said.getvalue()


@cache
def our_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    return parser()


def parse(arguments: list[str]) -> tuple[argparse.Namespace | None, list[str]]:
    """Return the parsed arguments, None for help and version, and what the parser says against them."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            return _parsed([*arguments]), []  # as the program itself does, whose messages these are
    except SystemExit as stop:
        return None, [said.getvalue().strip().splitlines()[-1]] if stop.code else []


def can_run(arguments: list[str], given: argparse.Namespace) -> bool:
    """Return whether all that a command reads is in the working folder, and nothing of it needs another machine."""
    verb = " ".join(word for word in arguments[:2] if not word.startswith("-"))
    if any(verb == each or verb.startswith(f"{each} ") for each in NOT_RUN) or re.search(
        r"[$~…]", " ".join(arguments)
    ):
        return False
    top = verbs_of(our_parser())
    chosen = top.get(verb) or top[arguments[0]]
    for action in chosen._actions:
        value = getattr(given, action.dest, None)
        if value in (None, []) or action.choices or (action.option_strings and action.dest not in READ):
            continue
        if arguments[0] in ("cp", "cache") or (verb == "bundle extract" and action.dest == "tasks"):
            continue  # names of recipes, fingerprints, names of tasks in a bundle
        for each in value if isinstance(value, list) else [value]:
            if not glob.glob(str(each).split("::")[0]):
                return False
    return True


def run(arguments: list[str]) -> tuple[int, str, str]:
    """Run a command in this process, its patterns filled in as a shell does: exit status, stdout, stderr."""
    words = [name for word in arguments for name in (sorted(glob.glob(word)) or [word] if "*" in word else [word])]
    said, errors = io.StringIO(), io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        warnings.simplefilter("always")  # said on stderr, as on the command line
        status = main(words)
    return status, said.getvalue(), errors.getvalue()
