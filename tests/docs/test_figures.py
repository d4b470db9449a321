"""The script that draws the figures of docs/concepts.md, on small adapters."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "figures"
NAMES = ("break-even.svg", "energy.svg", "product.svg", "relations.svg")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("figures_of_concepts", FIGURES / "concepts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_figures_are_of_the_arrays_given(script: ModuleType, stand_ins: Path, tmp_path: Path) -> None:
    script.draw(stand_ins / "demo-output", tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(NAMES)
    drawn = {name: (tmp_path / name).read_text(encoding="utf-8") for name in NAMES}
    assert "64 × 64" in drawn["product.svg"] and "16 × 16" in drawn["product.svg"]  # the stand-ins' width
    assert all(name in drawn["relations.svg"] for name in ("sst2", "cola"))
    other = tmp_path / "again"
    other.mkdir()
    script.draw(stand_ins / "demo-output", other)
    assert {name: (other / name).read_text(encoding="utf-8") for name in NAMES} == drawn


def test_the_page_shows_every_figure_and_each_is_there() -> None:
    shown = re.findall(r"\(figures/([\w-]+\.svg)\)", (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(NAMES)
    assert all((FIGURES / name).stat().st_size < 100_000 for name in shown)
