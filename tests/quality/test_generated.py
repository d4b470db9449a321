"""Tables between markers in pages of documentation."""

from __future__ import annotations

import pytest

from benchmarks.quality.generated import fill, markers, replaced

SCRIPT = "benchmarks/some/tables.py"


def page_of(*tables: str) -> str:
    return "before\n" + "".join("{}\nold\n{}\n\n".format(*markers(SCRIPT, name)) for name in tables) + "after\n"


def test_each_table_goes_between_its_own_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(page_of("text", "image", "other"))
    fill(page, SCRIPT, {"image": ["| a |", "|---|"], "text": ["| b |"]})
    first, second, third = (page.read_text().split(markers(SCRIPT, name)[0])[1] for name in ("text", "image", "other"))
    assert first.startswith("\n\n| b |\n\n<!--") and second.startswith("\n\n| a |\n|---|\n\n<!--")
    assert third.startswith("\nold\n")
    assert page.read_text().startswith("before\n") and page.read_text().endswith("after\n")
    before = page.read_bytes()
    fill(page, SCRIPT, {"image": ["| a |", "|---|"]})
    assert page.read_bytes() == before


@pytest.mark.parametrize("text", ["no markers", markers(SCRIPT, "text")[0], "{1}{0}".format(*markers(SCRIPT, "text"))])
def test_a_page_without_both_markers_is_left_as_it_was(text, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="nowhere"):
        fill(page, SCRIPT, {"text": ["| a |"]})
    assert page.read_text() == text


def test_a_page_with_one_generated_part():
    text = "a\n{}\nold\n{}\nb".format(*markers(SCRIPT))
    assert replaced(text, "new\n", markers(SCRIPT)) == "a\n{}\nnew\n{}\nb".format(*markers(SCRIPT))
