"""Valid files, made once, to be spoilt in copies; no network."""

from __future__ import annotations

import shutil

import pytest

from subspace_peft.basis.living import _alive

from .make import make_files

HUGE = 10**400
DEEP = "[" * 100_000 + "]" * 100_000
SLOW_PATTERN = "(a+)+b"


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("valid"))


@pytest.fixture
def files(valid, tmp_path):
    # a damaged basis that an earlier test opened has the same fingerprint, and would be found as long as it lives
    _alive.clear()
    root = next(iter(valid.values())).parent
    shutil.copytree(root, tmp_path / "files")
    return {name: tmp_path / "files" / path.name for name, path in valid.items()}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    # a Hub id in a hostile file must not make the tests wait for a network
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
