"""Each fact of the documentation has one page, and every guide says what it achieves and what can go wrong."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
GUIDES = sorted(page for page in (DOCS / "how-to").glob("*.md") if page.name != "index.md")
FENCED = re.compile(r"^(```+).*?^\1\s*$", re.MULTILINE | re.DOTALL)


def sentences(text: str) -> set[str]:
    """Return a page's longer sentences, tables, headings and code left out."""
    found = set()
    for paragraph in re.split(r"\n\s*\n|\n(?=- )", FENCED.sub("", text)):
        if not paragraph.lstrip().startswith(("|", "#", ":::", "<!--")):
            for sentence in re.split(r"(?<=[.:;!?])\s+", " ".join(paragraph.split())):
                if len(sentence) > 60:
                    found.add(sentence.strip("-* "))
    return found


def repeated(pages: dict[str, str]) -> dict[str, list[str]]:
    """Return the sentences that stand on several pages, with these."""
    places = defaultdict(list)
    for name, text in pages.items():
        for sentence in sentences(text):
            places[sentence].append(name)
    return {sentence: names for sentence, names in places.items() if len(names) > 1}


def test_no_sentence_stands_on_two_pages() -> None:
    pages = {str(page.relative_to(DOCS)): page.read_text(encoding="utf-8") for page in sorted(DOCS.rglob("*.md"))}
    assert len(pages) > 30
    assert repeated(pages) == {}


def test_a_repeated_sentence_is_found() -> None:
    said = "A basis holds directions that are shared by all of the tasks that were trained in it."
    assert repeated({"a": f"# A\n\n{said}\n", "b": f"- First.\n- {said}\n", "c": f"```text\n{said}\n```\n"}) == {
        said: ["a", "b"]
    }


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_a_guide_says_what_it_achieves_and_what_can_go_wrong(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    title, first = text.split("\n\n")[:2]
    assert title.startswith("# ") and "\n" not in title
    assert not first.startswith(("#", "```", "|", "-", "<")) and first.rstrip().endswith((".", ":")), first
    last = re.split(r"^## ", text, flags=re.MULTILINE)[-1]
    assert last.startswith("What can go wrong\n"), last.splitlines()[0]
    assert "troubleshooting" in last or page.stem in ("large-fleets", "several-processes"), "no link to the messages"
