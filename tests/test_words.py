"""Plain words: no text of the package or its recipes has one of the words that readers tripped on."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    *(file for folder in ("subspace_peft", "recipes") for file in sorted((ROOT / folder).rglob("*.py"))),
    *sorted((ROOT / "subspace_peft").rglob("*.j2")),
]
# what is trained or stored are parameters; adapters of one origin are related
AVOIDED = re.compile(
    r"\b((trained|frozen|stored|trainable) numbers|kin|fleet of noise|nobody|somebody|whoever|anybody|anew)\b", re.I
)


def texts(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the texts of a file: of Python its docstrings and other strings, with their lines."""
    source = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        yield 1, source
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


@pytest.mark.parametrize(("text", "found"), [("1,024 trained numbers", True), ("its kin", True), ("any kind", False)])
def test_the_pattern(text, found):
    assert bool(AVOIDED.search(text)) == found


def test_texts_use_plain_words():
    assert len(FILES) > 200
    said = [
        f"{file.relative_to(ROOT)}:{line}: {match.group()}"
        for file in FILES
        for line, text in texts(file)
        for match in AVOIDED.finditer(text)
    ]
    assert said == []
