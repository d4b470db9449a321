"""What the recipes' tests share: loading a recipe as a module, no network, counted trainings. Each has a fixture
`recipe` of its own."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
# real packages are fetched once for all runs of the tests, not once per test
REAL_CACHE = ROOT / ".cache" / "subspace_peft"


def load_recipe(name: str) -> ModuleType:
    """recipes/<name>.py as a module."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


def typed(given: dict[str, Any], *more: str) -> list[str]:
    """Arguments as they are typed, two seeds among them."""
    return [*(str(part) for name, value in given.items() for part in (f"--{name}", value)), "--seeds", "1", "2", *more]


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


def goes_on_from_its_checkpoint(
    recipe: ModuleType, arguments: Callable[[Path], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training of three epochs that is interrupted as the second ends, and called again, gives what an uninterrupted
    one does.

    Args:
        arguments: folder of the output → what is typed, with ``--stage train`` and the task `kept`.
    """

    def whole(out: Path) -> dict[str, Any]:
        recipe.main(arguments(out))
        return json.loads((out / "tasks" / "kept-core" / "recipe.json").read_text())["result"]

    expected = whole(tmp_path / "whole")
    epochs: list[int] = []
    original = recipe.LabelledTask.measure

    def interrupted(self: Any, prediction: Any) -> dict[str, float]:
        epochs.append(1)
        if len(epochs) == 2:
            raise KeyboardInterrupt
        return original(self, prediction)

    with monkeypatch.context() as patch:
        patch.setattr(recipe.LabelledTask, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            whole(tmp_path / "cut")
    (checkpoints,) = (tmp_path / "cut" / "checkpoints").glob("kept-core-*")
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-2"]
    resumed = whole(tmp_path / "cut")
    assert (resumed["curve"], resumed["metrics"]) == (expected["curve"], expected["metrics"])
    weights = [tmp_path / name / "tasks" / "kept-core" / "adapter_model.safetensors" for name in ("whole", "cut")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not checkpoints.exists()
