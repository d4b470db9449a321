"""docs/troubleshooting.md quotes what the package says, word for word, with … for what differs."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import subspace_peft

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
PACKAGE = Path(subspace_peft.__file__).parent
ENTRY = re.compile(r"^-   (`{1,2})(.+?)\1\n\n((?:    .+\n)+)", re.MULTILINE)


def entries(text: str) -> dict[str, str]:
    """Return a page's quoted messages, each with what is said of it."""
    return {quote: " ".join(said.split()) for _, quote, said in ENTRY.findall(text)}


def template(node: ast.expr) -> str:
    """Return a text of the source with … for each hole; all of it is one where it is put together by +."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return "…"


@cache
def templates() -> list[str]:
    """Return every text of the package's source that is long enough for a message."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp)):
                text = template(node)
                if len(text.replace("…", "")) >= 10:
                    found.add(text)
    return sorted(found)


def is_said(quote: str) -> bool:
    """Return whether the package has a text with the quote's fixed parts in order, and little else between."""
    parts = quote.split("…")
    longest = max(parts, key=len)
    # a hole of the quote may stand for several of the source, and for the words between them
    pattern = re.compile(".{0,90}?".join(map(re.escape, parts)), re.DOTALL)
    return any(longest in text and pattern.search(text) for text in templates())


@pytest.mark.parametrize("quote", entries(PAGE.read_text(encoding="utf-8")))
def test_each_quoted_text_is_one_that_the_package_prints(quote: str) -> None:
    fixed = re.sub(r"[…\W]", "", quote)
    assert len(fixed) >= 12, "too little of it is fixed to be found again"
    assert is_said(quote)


def test_forty_messages_and_more_have_a_cause_and_a_remedy() -> None:
    found = entries(PAGE.read_text(encoding="utf-8"))
    assert len(found) >= 40
    assert [quote for quote, said in found.items() if len(said) < 15] == []


def test_a_text_that_is_not_in_the_package_is_found_out() -> None:
    assert not is_said("There is no basis of that colour.")
    assert not is_said("… needs the basis with fingerprint …, and has …")
    assert is_said("… needs the basis with fingerprint …, but got")


def test_no_entry_is_passed_over() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(re.findall(r"^- ", text, re.MULTILINE)) == len(ENTRY.findall(text))
