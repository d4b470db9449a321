"""What a verb says where it would be silent: its phase, or the bar that stands still, a recipe's own too."""

from __future__ import annotations

import io
import sys
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import pytest
from tqdm import tqdm

from subspace_peft._io import progress
from subspace_peft.cli import pulse
from subspace_peft.cli.main import RESUMED, main


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setattr(pulse, "SILENCE", 0.02)
    monkeypatch.setattr(pulse, "TICK", 0.01)
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress, "_bar", None)
    return Terminal()


def wait_for(words: str, terminal: Terminal, count: int = 1) -> None:
    end = time.monotonic() + 20
    while terminal.getvalue().count(words) < count and time.monotonic() < end:
        time.sleep(0.01)
    assert terminal.getvalue().count(words) >= count, terminal.getvalue()


def test_a_phase_without_a_bar_is_said(terminal):
    with redirect_stderr(terminal), pulse.pulse("demo", True):
        wait_for("loading what demo needs (", terminal)
        progress.begin("preparing")
        wait_for("preparing (", terminal)
    assert terminal.getvalue().endswith("\r")  # and taken away again


def test_a_recipes_own_bar_that_stands_still_is_drawn_again(terminal):
    with redirect_stderr(terminal), pulse.pulse("demo", True), tqdm(total=8, desc="source adapters", file=terminal):
        drawn = terminal.getvalue().count("source adapters:")
        wait_for("source adapters:", terminal, drawn + 3)


def test_a_bar_that_is_closed_or_hidden_is_none():
    with tqdm(total=1, file=io.StringIO()) as bar:
        assert progress.open_bar() is bar
        with tqdm(total=1, disable=True):
            assert progress.open_bar() is bar
    assert progress.open_bar() is not bar


def test_a_result_stands_alone_in_its_line(terminal):
    with redirect_stderr(terminal), redirect_stdout(terminal), pulse.pulse("project", True):
        wait_for("loading what project needs (", terminal)
        print("energy kept")
        wait_for("loading what project needs (", terminal, terminal.getvalue().count("loading") + 1)
        print("a warning", file=sys.stderr)
    assert [drawn(line) for line in terminal.getvalue().split("\n")] == ["energy kept", "a warning", ""]


def drawn(line: str) -> str:
    """Return what a terminal shows of a line with carriage returns."""
    shown = ""
    for part in line.split("\r"):
        shown = part + shown[len(part) :]
    return shown.rstrip()


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("demo", True),
        ("record-base b --base-model m", True),
        ("validate b", True),
        ("push b org/b", True),
        ("validate b -q", False),
        ("run script.py", False),
    ],
)
def test_every_verb_but_run_says_what_it_is_doing(words, shown, monkeypatch):
    asked = []

    @contextmanager
    def stand_in(verb, shown):
        asked.append(shown)
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(sys.modules["subspace_peft.cli.main"], "pulse", stand_in)
    assert main(words.split()) == 130
    assert asked == [shown]


def test_nothing_is_said_in_a_file(terminal):
    with redirect_stderr(io.StringIO()) as file, pulse.pulse("demo", True):
        time.sleep(0.1)
    assert file.getvalue() == ""


def test_the_demo_says_what_it_is_doing_and_goes_on_when_interrupted(monkeypatch, capsys):
    monkeypatch.setattr("subspace_peft.cli.recipes.demo", interrupt)
    monkeypatch.setattr("subspace_peft.recipes.load_recipe", interrupt)
    assert main(["demo"]) == 130
    assert f"the same command goes on from the finished {RESUMED['demo']}" in capsys.readouterr().err


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("words", "bars"), [([], True), (["-q"], False)])
def test_quiet_hides_the_hubs_bars_of_uploads(words, bars, monkeypatch, tmp_path):
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

    enable_progress_bars()
    seen = []

    def stand_in(*_: object) -> str:
        seen.append(not are_progress_bars_disabled())
        raise KeyboardInterrupt

    monkeypatch.setattr("subspace_peft.cli.sharing._push", stand_in)
    assert main(["push", str(tmp_path), "org/basis", *words]) == 130
    assert seen == [bars] and not are_progress_bars_disabled()
