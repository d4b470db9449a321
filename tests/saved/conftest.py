"""Base models for the tests of files of earlier versions, and no basis in memory that they could find instead."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import nn

from .models import MAKERS

pytest.register_assert_rewrite("tests.saved.checks")


@pytest.fixture(scope="package", autouse=True)
def little_garbage() -> Iterator[None]:
    """Keep what other modules left out of every collection, which then takes little time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_basis_in_memory(little_garbage) -> None:
    """Forget earlier tests' models: a basis that one of them held would be found whatever a task says of its place."""
    gc.collect()


@pytest.fixture(scope="package")
def made() -> dict[str | None, nn.Module]:
    return {name: make() for name, make in MAKERS.items()}


@pytest.fixture
def base(made) -> Callable[[Path | None], nn.Module]:
    """A base model of its own for a task's folder, by default BERT."""

    from .checks import CONFIG, said

    def copied(folder: Path | None = None) -> nn.Module:
        return copy.deepcopy(made[None if folder is None else said(folder / CONFIG)["base_model_name_or_path"]])

    return copied
