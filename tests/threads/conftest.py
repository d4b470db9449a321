"""A served model of each kind."""

from __future__ import annotations

import pytest

from .served import MODELS, Served


@pytest.fixture(scope="module", params=MODELS)
def served(request) -> Served:
    return Served(*MODELS[request.param])


@pytest.fixture(scope="module")
def linear() -> Served:
    return Served(*MODELS["linear"])
