"""One folder of stand-ins for all pages, copied for each."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `stand_ins.make_folder`, in which no page runs."""
    from .stand_ins import make_folder

    return make_folder(tmp_path_factory.mktemp("stand-ins"))
