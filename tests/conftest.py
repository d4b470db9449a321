"""What every test has: its own cache folder, small fleets and their bases.

Nothing heavy is imported here: of several pytest processes, the one that only hands out tests reads this file too.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models here are too small to share among cores

import pytest

if TYPE_CHECKING:
    from torch import nn

    from subspace_peft import SubspaceBasis


SLOW_LIMIT = 1800  # seconds; a slow test takes ten minutes at most on two cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give slow tests more time than the others have, three times what they take."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_LIMIT))


def pytest_collection_finish() -> None:
    """Leave the libraries' million objects out of garbage collections: the Trainer starts one for every training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SUBSPACE_PEFT_CACHE", str(folder))
    return folder


@pytest.fixture
def many_switches() -> Iterator[None]:
    """Let threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def compiler() -> Iterator[None]:
    """Let what a test compiles be counted from nothing, and leave nothing behind."""
    import torch

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture(scope="session", params=["bert", "gpt2"], ids=["linear", "conv1d"])
def kind(request: pytest.FixtureRequest) -> Callable[..., nn.Module]:
    from . import models

    return getattr(models, request.param)


@pytest.fixture(scope="session")
def fleets(tmp_path_factory: pytest.TempPathFactory) -> dict[object, list[str]]:
    """Five saved LoRAs for each kind of model."""
    from .models import bert, gpt2, train_lora

    made = {}
    for make in (bert, gpt2):
        root = tmp_path_factory.mktemp(make.__name__)
        made[make] = [str(train_lora(make, root / f"lora{i}", seed=10 + i)) for i in range(5)]
    return made


@pytest.fixture(scope="session")
def bases(fleets: dict[Any, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[object, SubspaceBasis]:
    """The basis of each fleet, saved in a folder that no test writes into."""
    from subspace_peft import build_basis

    made = {}
    for make, folders in fleets.items():
        basis = build_basis(folders, k=6, directions=3, progress=False)
        basis.save_pretrained(tmp_path_factory.mktemp(f"{make.__name__}-basis"))
        made[make] = basis
    return made


@pytest.fixture
def basis_folder(bases: dict[Any, SubspaceBasis], tmp_path: Path) -> Path:
    """A copy of the basis of the `bert` fleet, for the test to change."""
    from .models import bert

    return Path(shutil.copytree(bases[bert].location, tmp_path / "basis"))
