"""Adapters, a basis, tasks and a bundle, made once; and the warnings that a call gives."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from subspace_peft import build_basis, bundle_tasks, project_lora

from ..models import bert, train_lora

SAID = re.compile(r"has no effect|have no effect|which is used|fewer directions|no more than|more than")


def said(call: Callable[[], Any]) -> str:
    """What `call` warns of, in one text; other packages' warnings aside."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return " ".join(text for each in caught if SAID.search(text := str(each.message)))


@pytest.fixture(scope="package")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    for i in (1, 2, 3):
        train_lora(bert, folder / f"lora{i}", seed=i)
    built = build_basis(loras(folder), k=4, directions=2, keep_cores=True, progress=False)
    built.save_pretrained(folder / "basis")
    for i in (1, 2):
        project_lora(folder / f"lora{i}", built).save_pretrained(folder / f"task{i}")
    bundle_tasks([folder / "task1", folder / "task2"], folder / "bundle", progress=False)
    return folder


def loras(folder: Path) -> list[str]:
    return [str(folder / f"lora{i}") for i in (1, 2)]
