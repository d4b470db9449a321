"""What a verb says where it would be silent: its phase, or the bar that stands still, a recipe's own too."""

from __future__ import annotations

import io
import time
from contextlib import redirect_stderr

import pytest
from tqdm import tqdm

from subspace_peft._io import progress
from subspace_peft.cli import pulse
from subspace_peft.cli.main import RESUMED, WITH_BARS, main


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


def test_nothing_is_said_in_a_file(terminal):
    with redirect_stderr(io.StringIO()) as file, pulse.pulse("demo", True):
        time.sleep(0.1)
    assert file.getvalue() == ""


def test_the_demo_says_what_it_is_doing_and_goes_on_when_interrupted(monkeypatch, capsys):
    assert "demo" in WITH_BARS
    monkeypatch.setattr("subspace_peft.cli.recipes.demo", interrupt)
    monkeypatch.setattr("subspace_peft.recipes.load_recipe", interrupt)
    assert main(["demo"]) == 130
    assert f"the same command goes on from the finished {RESUMED['demo']}" in capsys.readouterr().err


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt
