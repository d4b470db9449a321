"""Errors speak in the words of the one who reads them: Python's in arguments, the command line's in flags it has."""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path

import pytest

from subspace_peft.cli import main
from subspace_peft.cli.language import flags_of_verb, in_flags, spoken_warnings, verbs_of
from subspace_peft.cli.main import parser
from subspace_peft.errors import SourceError, SubspaceError

PACKAGE = Path(__file__).parent.parent / "subspace_peft"
VERBS = verbs_of(parser())
FLAGS = {name: flags_of_verb(verb) for name, verb in VERBS.items()}
KNOWN = {name: {flag for action in verb._actions for flag in action.option_strings} for name, verb in VERBS.items()}
COMMAND = r"subspace-peft ([a-z][^`).]*)"
# arguments of others, in texts about what was done with them: no advice to the reader of the error
OTHERS = {"weights_only", "use_dora", "lora_bias", "bias", "init_lora_weights"}


def template(node: ast.AST) -> str:
    """Return a text with X for what is filled in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    return "".join(template(part) if isinstance(part, ast.Constant) else "X" for part in node.values)  # type: ignore[attr-defined]


def messages() -> list[tuple[str, type[Exception], str]]:
    """Return every text of the package that names an argument or a flag, with its place and the kind of error."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        if "cli" in file.parts:
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        skipped = {
            id(child)
            for node in ast.walk(tree)
            for child in ast.walk(node)
            if (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
            or (isinstance(node, ast.JoinedStr) and child is not node)
        }
        sources = {
            id(child)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("SourceError", "ProcessError")
            for child in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, (ast.JoinedStr, ast.Constant)) and id(node) not in skipped:
                text = template(node)
                if re.search(r"\w \w|: ", text) and re.search(r"\b[a-z]\w*=(?!=)|(?<![\w-])--[a-z]", text):
                    kind = SourceError if id(node) in sources else SubspaceError
                    found.append((f"{file.relative_to(PACKAGE)}:{node.lineno}", kind, text))
    return found


MESSAGES = messages()


def test_the_messages_are_found():
    assert len(MESSAGES) > 80
    assert {kind for _, kind, _ in MESSAGES} == {SourceError, SubspaceError}


@pytest.mark.parametrize(("place", "kind", "text"), MESSAGES, ids=[place for place, _, _ in MESSAGES])
def test_every_message_names_flags_that_the_verb_has_and_no_argument_of_python(place, kind, text):
    for verb, flags in FLAGS.items():
        said = in_flags(kind(text), flags)
        for quoted in re.findall(COMMAND, said):
            command = next(name for name in sorted(VERBS, key=len, reverse=True) if quoted.startswith(name))
            assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", quoted)) <= KNOWN[command], said
        bare = re.sub(r"`[^`]*`", "", re.sub(COMMAND, "", said))
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", bare)) <= KNOWN[verb], said
        for name, value, after in re.findall(r"(?<![\w/.-])([a-z]\w*)=(True|False|…)?(?=([\s.,:;)]|$).*)", bare):
            if kind is SourceError or name not in OTHERS:
                assert name in OTHERS or re.search(rf"{name}={value} in Python", said), (verb, said, after)
        if kind is SubspaceError:
            known = [name for name in re.findall(r"(?<![\w/.-])([a-z]\w*)=", bare) if "" in flags.get(name, {})]
            assert known == [], said


@pytest.mark.parametrize(
    ("verb", "text", "said"),
    [
        ("build", "k=0: give a number", "-k 0: give a number"),
        ("build", "alternations=-1: give", "--alternations -1: give"),
        ("build", "Pass skip_bad=True (--skip-bad) to go on.", "Pass --skip-bad to go on."),
        ("build", "Pass base_model= (--base-model).", "Pass --base-model."),
        ("compress", "Pass skip_bad=True (--skip-bad).", "Pass --skip-bad."),
        ("project", "partial=True (--partial) takes it", "partial=True in Python takes it"),
        ("project", "or pass check_base_model=False if you know.", "or pass --no-base-check if you know."),
        ("inspect", "the one trained on as `basis=`, or", "the one trained on as `basis= in Python`, or"),
        ("export-lora", "the one trained on as `basis=`, or", "the one trained on as `--basis`, or"),
        ("migrate", "the one trained on as `basis=`, or", "the one trained on as `--old-basis`, or"),
        ("export-lora", "modules_to_save=True (--modules-to-save)", "--modules-to-save"),
        ("export-lora", "modules_to_save=False (--no-modules-to-save)", "--no-modules-to-save"),
        (
            "push",
            "(push_basis_to='org/basis', or x), or force=True.",
            "(--push-basis-to 'org/basis', or x), or --force.",
        ),
        ("push", "have to pass the basis, with basis=….", "have to pass the basis, with basis=… in Python."),
        ("bundle add", "or replace it with replace=True (--replace).", "or replace it with --replace."),
        ("bundle extract", "own_directions=False leaves them out", "--no-own-directions leaves them out"),
        ("project", "extra_rank=-1 (--extra-rank -1): give a", "--extra-rank -1: give a"),
        ("project", "the basis has k=16 in /data/k=3/x", "the basis has k=16 in /data/k=3/x"),
        ("build", "Build it with `build_basis(k=3)`.", "Build it with `build_basis(k=3)`."),
        (
            "bundle ls",
            "Make one with `bundle_tasks` (`subspace-peft bundle create`), or pass",
            "Make one with `subspace-peft bundle create`, or pass",
        ),
        (
            "migrate",
            "with `update_basis(…, add=…)` (`subspace-peft update --add`).",
            "with `subspace-peft update --add`.",
        ),
        ("cp", "or overwrite it with force=True (--force).", "or overwrite it with --force."),
    ],
)
def test_a_verb_speaks_in_its_own_flags(verb, text, said):
    assert in_flags(SubspaceError(text), FLAGS[verb]) == said


def test_texts_about_sources_keep_their_names():
    text = "runs k=3: cannot be read; skip_bad=True (--skip-bad) leaves it out"
    assert in_flags(SourceError(text), FLAGS["build"]) == "runs k=3: cannot be read; --skip-bad leaves it out"


def test_warnings_are_one_line_in_flags():
    text = "Pass modules_to_save=True (--modules-to-save) to keep it."
    with spoken_warnings("export-lora", FLAGS["export-lora"]):
        line = warnings.formatwarning(text, UserWarning, "file.py", 3)
    assert line == "subspace-peft export-lora: Pass --modules-to-save to keep it.\n"
    assert "file.py" in warnings.formatwarning(text, UserWarning, "file.py", 3)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["export-lora", "TASK", "--rank", "0", "--out", "OUT"], "--rank 0: give at least 1"),
        (
            ["compress", "LORA", "--basis", "BASIS", "--out", "OUT", "--min-energy", "7"],
            "--min-energy 7: give a share",
        ),
        (["compress", "LORA", "--basis", "BASIS", "--out", "OUT", "--residual", "-1"], "--residual -1: give a rank"),
        (["report", "BASIS", "--sample", "1"], "--sample 1, --modules None: give at least 2"),
        (["migrate", "TASK", "--basis", "BASIS", "--out", "OUT", "--max-drift", "-1"], "--max-drift -1.0: give 0"),
        (["cp", "glue", "--out", "FULL"], "or overwrite it with --force"),
    ],
)
def test_errors_that_python_raises_too_name_the_flags(arguments, part, capsys, bases, fleets, tmp_path):
    from subspace_peft import project_lora

    from .models import bert

    places = {"TASK": tmp_path / "task", "LORA": fleets[bert][0], "BASIS": bases[bert].location}
    places |= {"OUT": tmp_path / "out", "FULL": tmp_path / "full.py"}
    project_lora(fleets[bert][0], bases[bert]).save_pretrained(places["TASK"])
    places["FULL"].write_text("mine")
    assert main([str(places.get(each, each)) for each in arguments]) == 1
    said = capsys.readouterr().err
    assert part in said and said.startswith(f"subspace-peft {arguments[0]}: ") and "Traceback" not in said


def test_a_reader_that_has_enough_ends_the_output_quietly(monkeypatch, capsys):
    from subspace_peft.cli import recipes

    def gone(facts):
        raise BrokenPipeError

    monkeypatch.setattr("os.dup2", lambda *given: None)
    monkeypatch.setattr("sys.stdout.fileno", lambda: 1, raising=False)
    monkeypatch.setattr(recipes, "print_table", gone)
    assert main(["cp"]) == 141
    assert capsys.readouterr().err == ""


def test_too_little_memory_is_said_without_a_traceback(monkeypatch, capsys):
    from subspace_peft.cli import recipes

    def large(facts):
        raise MemoryError

    monkeypatch.setattr(recipes, "print_table", large)
    assert main(["cp"]) == 1
    assert capsys.readouterr().err == "subspace-peft cp: there is not enough memory for this on this machine.\n"
