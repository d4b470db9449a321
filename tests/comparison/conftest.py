"""Three small tasks that arrive after two whose LoRAs are given. No downloads."""

from __future__ import annotations

import pytest

from benchmarks.continual.setting import Data, Stream
from benchmarks.quality.bench import Bench
from tests.quality.conftest import NAMES, SMALL, toys  # noqa: F401 (a fixture)

STREAM = Stream(given=NAMES[:2], arriving=("fifth", "second", NAMES[2]), seed=1)


@pytest.fixture
def data(tmp_path, toys):  # noqa: F811
    """Tasks of 16 features, and a basis of four directions."""
    return Data(Bench(tmp_path, source_budget=SMALL), SMALL, k=4)
