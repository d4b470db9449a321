"""The command line's own face: help in groups with examples that hold, how much is said, `env`, completion."""

from __future__ import annotations

import argparse
import json
import logging
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import subspace_peft
from subspace_peft._io.progress import progress_bar
from subspace_peft.cli import main
from subspace_peft.cli.examples import EXAMPLES
from subspace_peft.cli.language import verbs_of
from subspace_peft.cli.main import _parsed
from subspace_peft.cli.parsers import GROUPS
from subspace_peft.cli.verbosity import apply
from subspace_peft.cli.verbs import VERBS as GROUPED
from subspace_peft.cli.verbs import parser
from subspace_peft.errors import SubspaceError

TOP = parser()
VERBS = verbs_of(TOP)
(CHOICES,) = (each for each in TOP._actions if isinstance(each, argparse._SubParsersAction))
ALL = {**VERBS, **{name: CHOICES.choices[name] for name in ("bundle", "cache")}}
COMMANDS = [command for each in EXAMPLES.values() for command in each]


@pytest.fixture(autouse=True)
def level_as_before():
    logger = logging.getLogger("subspace_peft")
    before = logger.level
    yield
    logger.setLevel(before)


# -- help -------------------------------------------------------------------------------------------------------------


def test_every_verb_is_in_one_group_and_has_a_line():
    listed = [name for names in CHOICES.groups.values() for name in names]
    assert sorted(listed) == sorted(CHOICES.choices) and list(CHOICES.groups) == list(GROUPED)
    lines = {line.dest: line.help for line in CHOICES._choices_actions}
    assert lines.keys() == CHOICES.choices.keys() and all(line and len(line) <= 64 for line in lines.values())


@pytest.mark.parametrize("name", ALL)
def test_a_verb_has_sentences_groups_and_examples(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    verb = ALL[name]
    assert len(re.findall(r"[.;:] ?", verb.description)) >= 2 and verb.description.endswith(".")
    titles = [group.title for group in verb._action_groups if group._group_actions]
    assert set(titles) <= {*GROUPS, "positional arguments", "options"}
    assert 2 <= len(EXAMPLES[name]) <= 4
    text = verb.format_help()
    shown, _, examples = text.partition("examples:\n")
    assert max(map(len, shown.splitlines())) <= 80, text
    assert [line.strip() for line in examples.splitlines()] == list(EXAMPLES[name])
    for action in verb._actions:
        assert action.help or not action.option_strings, (name, action.option_strings)
        assert not any("_" in flag for flag in action.option_strings)


def test_the_whole_help_fits_into_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert said == TOP.format_help() and said.index("build and grow:") < said.index("learn:") < said.index("options:")
    for alone in ("bundle", "cache"):
        assert main([alone]) == 0
        assert capsys.readouterr().out == CHOICES.choices[alone].format_help()


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_parse(command):
    words = shlex.split(command.removeprefix('eval "$(').removesuffix(')"').partition(" > ")[0])
    assert words[0] == "subspace-peft"
    found = _parsed(words[1:])
    assert found.verb == words[1] and (found.run is not None)


@pytest.mark.parametrize("command", ["cp", "cache ls", "cache ls --json", "cache verify", "cp glue --out COPY"])
def test_examples_that_need_nothing_run(command, tmp_path, capsys):
    assert main(command.replace("COPY", str(tmp_path / "my_glue.py")).split()) == 0
    assert capsys.readouterr().out


# -- how much is said -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "environment", "level", "verbose", "quiet"),
    [
        (["inspect", "x"], None, "WARNING", 0, 0),
        (["inspect", "x", "-v"], None, "INFO", 1, 0),
        (["-v", "inspect", "x"], None, "INFO", 1, 0),
        (["-v", "inspect", "x", "--verbose"], None, "DEBUG", 2, 0),
        (["bundle", "-v", "ls", "x"], None, "INFO", 1, 0),
        (["-v", "cache", "--quiet", "-q", "ls"], None, "ERROR", 0, 1),
        (["-vv", "build", "x"], None, "DEBUG", 2, 0),
        (["build", "x", "-q"], None, "ERROR", 0, 1),
        (["--quiet", "build", "x", "-q"], None, "CRITICAL", 0, 2),
        (["bundle", "ls", "x", "-qq"], None, "CRITICAL", 0, 2),
        (["build", "x", "-qv"], None, "WARNING", 0, 0),
        (["inspect", "x"], "info", "INFO", 1, 0),
        (["inspect", "x"], "ERROR", "ERROR", 0, 1),
        (["inspect", "x", "-v"], "error", "INFO", 1, 0),
        (["-v", "run", "script.py", "-q"], None, "INFO", 1, 0),
    ],
)
def test_verbosity(words, environment, level, verbose, quiet, monkeypatch):
    monkeypatch.delenv("SUBSPACE_PEFT_VERBOSITY", raising=False)
    if environment:
        monkeypatch.setenv("SUBSPACE_PEFT_VERBOSITY", environment)
    found = _parsed(words)
    apply(found)
    assert (found.verbose, found.quiet) == (verbose, quiet)
    assert logging.getLevelName(subspace_peft.logging.get_verbosity()) == level
    if found.verb == "run":
        assert found.script == ["script.py", "-q"]


def test_a_verb_leaves_a_program_that_calls_it_as_it_was(capsys):
    subspace_peft.logging.set_verbosity_info()
    for words in (["cp", "-qq"], ["cache", "rm", "-v"]):
        main(words)
        assert subspace_peft.logging.get_verbosity() == logging.INFO


def test_levels_are_set_as_in_transformers(capsys):
    log = subspace_peft.logging
    for name in ("debug", "info", "warning", "error"):
        getattr(log, f"set_verbosity_{name}")()
        assert log.get_verbosity() == log.LEVELS[name] == getattr(logging, name.upper())
    log.set_verbosity("critical")
    assert log.get_verbosity() == logging.CRITICAL
    with pytest.raises(SubspaceError, match="There is no verbosity 'loud'; choose one of debug, info"):
        log.set_verbosity("loud")
    assert log.get_logger().name == "subspace_peft" and log.get_logger("subspace_peft.hub").parent is log.get_logger()


def test_bars_follow_the_verbosity():
    log = subspace_peft.logging

    def hidden(shown: bool = True) -> bool:
        with progress_bar(desc="working", unit="step", shown=shown) as bar:
            return bool(bar.disable)

    log.set_verbosity_warning()
    assert not hidden() and hidden(shown=False)
    log.set_verbosity_error()
    assert hidden()
    log.set_verbosity_info()
    log.disable_progress_bar()
    try:
        assert hidden()
    finally:
        log.enable_progress_bar()
    assert not hidden()


def test_the_noise_of_an_import_is_hidden_and_nothing_else():
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    noise, real = (
        logger.makeRecord(logger.name, logging.WARNING, "ops.py", 1, text, (), None)
        for text in ("Failed to load CPU gemm_4bit_forward from kernels-community: none", "Failed to load libcuda")
    )
    for words, shown in ((["cp"], False), (["cp", "-vv"], True)):
        apply(_parsed(words))
        assert bool(logger.filter(noise)) is shown and logger.filter(real)


# -- env and completion -----------------------------------------------------------------------------------------------


def test_env_has_no_secret_and_no_home(monkeypatch, capsys, tmp_path):
    home = tmp_path / "home" / "someone"
    (home / "cache").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    monkeypatch.setenv("HF_ENDPOINT", "https://user:hf_passwordpassword@hub.example")
    monkeypatch.setenv("SUBSPACE_PEFT_CACHE", str(home / "cache"))
    assert main(["env", "--json"]) == 0
    said = capsys.readouterr().out
    facts = json.loads(said)
    assert facts["versions"]["subspace_peft"] == subspace_peft.__version__ and facts["versions"]["torch"]
    assert facts["cache"]["folder"] == "~/cache" and facts["cache"]["bases"] == 0
    assert facts["devices"]["cpu_cores"] >= 1 and facts["hub"]["token"] is True
    assert facts["variables"]["HF_TOKEN"] == "set" and facts["variables"]["HF_ENDPOINT"] == "https://hub.example"
    assert main(["env", "--no-devices"]) == 0
    page = capsys.readouterr().out
    assert "### Versions" in page and "### Devices" not in page
    assert "| subspace_peft | " in page and "| HF_TOKEN | set |" in page
    for text in (said, page):
        assert "secret" not in text and "password" not in text and str(home) not in text


def test_env_of_a_torch_that_is_broken(monkeypatch, capsys, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so: cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch")
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"]["problem"] == "OSError: libcudart.so: cannot open"


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_scripts(shell, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "subspace-peft" in script and "export-lora" in script


def test_completion_without_shtab_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert "pip install shtab" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_verbs_flags_choices_and_places(tmp_path, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    for place in ("loras/sst2", "lora-file.txt", "library"):
        made = tmp_path / place
        made.parent.mkdir(exist_ok=True)
        made.write_text("") if place.endswith(".txt") else made.mkdir()
    wanted = {
        "bun": {"bundle"},
        "bundle ex": {"extract"},
        "build --prec": {"--precision"},
        "build --builder ra": {"random"},
        "inspect lo": {"loras", "lora-file.txt"},
        "build --out l": {"loras", "library"},
        "migrate --basis lo": {"loras", "lora-file.txt"},
    }
    lines = [
        f"COMP_WORDS=(subspace-peft {typed}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMPREPLY=();"
        ' _shtab_subspace_peft subspace-peft "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"; echo "${COMPREPLY[@]}"'
        for typed in wanted
    ]
    done = subprocess.run(
        ["bash", "-c", "\n".join(["source ./script", *lines])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert [set(line.split()) for line in done.stdout.splitlines()] == list(wanted.values()), done.stderr
    assert Path(tmp_path, "script").read_text().startswith("# bash: eval")


def test_an_empty_place_is_not_the_working_directory(tmp_path, monkeypatch, capsys):
    """An unset variable in a script, `--out "$OUT"`, would have written a basis over whatever lies here."""
    monkeypatch.chdir(tmp_path)
    for line in (["build", "x", "--out", ""], ["compress", "x", "--basis", "b", "--out", " "]):
        with pytest.raises(SystemExit) as left:
            main(line)
        assert left.value.code == 2 and "argument --out: it is empty" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
