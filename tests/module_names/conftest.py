"""A small fleet whose keys are renamed."""

from __future__ import annotations

import pytest

from .names import Fleet


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    return Fleet(tmp_path_factory.mktemp("names"))
