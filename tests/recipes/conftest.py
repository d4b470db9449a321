"""What the recipes' tests share: loading a recipe as a module, no network, counted trainings. Each has a fixture `recipe` of its own."""

from __future__ import annotations

import importlib.util
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


def load_recipe(name: str) -> ModuleType:
    """recipes/<name>.py as a module."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


def typed(knobs: dict[str, Any], *more: str) -> list[str]:
    """Arguments as they are typed, two seeds among them."""
    return [*(str(part) for name, value in knobs.items() for part in (f"--{name}", value)), "--seeds", "1", "2", *more]


@pytest.fixture
def trained(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every call of Trainer.train from here on."""
    calls: list[int] = []
    original = recipe.Trainer.train

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(recipe.Trainer, "train", train)
    return calls


@pytest.fixture
def no_network(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails whatever connects, asks for an address, or loads a data set, a tokenizer or an image processor."""

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(recipe.datasets, "load_dataset", refused)
    for name in ("AutoTokenizer", "AutoImageProcessor"):
        if hasattr(recipe, name):
            monkeypatch.setattr(getattr(recipe, name), "from_pretrained", refused)


@pytest.fixture
def dry(recipe: ModuleType, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the recipe's dry run prints with these arguments."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        recipe.main([*arguments, "--dry-run"])
        return capsys.readouterr().out

    return run
