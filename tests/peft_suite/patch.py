"""Puts rows into the source of PEFT's tests, by their structure and not by their text."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable

Edit = Callable[[str], str]
IMPORT = (
    "from subspace_peft import SubspaceConfig\n"
    "from tests.peft_suite.rows import (\n"
    "    SubspaceRandomConfig, batch_rows, custom_rows, rows, several_active_rows, subspace_config\n"
    ")\n"
)


class LayoutError(RuntimeError):
    """PEFT's tests are not laid out as the edit at hand expects."""


def _node(source: str, name: str) -> ast.stmt:
    for node in ast.parse(source).body:
        targets = [t.id for t in node.targets if isinstance(t, ast.Name)] if isinstance(node, ast.Assign) else []
        if name in targets or getattr(node, "name", None) == name:
            return node
    raise LayoutError(f"no {name!r} at the top level")


def after(name: str, text: str) -> Edit:
    """Insert the lines `text` after the top-level assignment to `name`."""

    def edit(source: str) -> str:
        lines = source.splitlines(keepends=True)
        lines.insert(_node(source, name).end_lineno or 0, text + "\n")
        return "".join(lines)

    return edit


def again(name: str, replace: dict[str, str]) -> Edit:
    """Append the class `name` once more as `<name>Subspace`, with other words in place of some (regular
    expressions)."""

    def edit(source: str) -> str:
        start, end = _lines(source, name)
        renamed = {rf"\b{name}\b": f"{name}Subspace", **replace}
        return f"{source}\n\n{_replaced(name, source[start:end], renamed)}"

    return edit


def within(name: str, replace: dict[str, str]) -> Edit:
    """Put other words in place of some (regular expressions) in the class `name`."""

    def edit(source: str) -> str:
        start, end = _lines(source, name)
        return source[:start] + _replaced(name, source[start:end], replace) + source[end:]

    return edit


def _lines(source: str, name: str) -> tuple[int, int]:
    node = _node(source, name)
    lengths = [len(line) for line in source.splitlines(keepends=True)]
    return sum(lengths[: node.lineno - 1]), sum(lengths[: node.end_lineno])


def _replaced(name: str, text: str, replace: dict[str, str]) -> str:
    for old, new in replace.items():
        text, count = re.subn(old, new, text)
        if not count:
            raise LayoutError(f"{name} has no {old!r} to put another word for")
    return text


def beside(theirs: str, ours: str) -> Edit:
    """Where a value is looked for in a tuple with the class `theirs`, look for `ours` too: such tuples say which
    methods can do what is tested."""

    def edit(source: str) -> str:
        found = [
            comparator
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn))
            for comparator in node.comparators
            if isinstance(comparator, ast.Tuple)
            and any(getattr(item, "id", None) == theirs for item in comparator.elts)
        ]
        if not found:
            raise LayoutError(f"no tuple of methods names {theirs}")
        lines = source.splitlines(keepends=True)
        for node in sorted(found, key=lambda node: (node.lineno, node.col_offset), reverse=True):
            # offsets are of UTF-8 bytes
            line, at = lines[node.lineno - 1].encode(), node.col_offset + 1
            lines[node.lineno - 1] = (line[:at] + f"{ours}, ".encode() + line[at:]).decode()
        return "".join(lines)

    return edit


def patched(file: str, source: str, edits: list[Edit]) -> str:
    """`source` with the rows' import after its last top-level import, and all `edits` made.

    Raises:
        LayoutError: an edit does not find its place; names `file` and what is missing.
    """
    imports = [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    lines = source.splitlines(keepends=True)
    lines.insert(imports[-1].end_lineno or 0, IMPORT)
    source = "".join(lines)
    for edit in edits:
        try:
            source = edit(source)
        except LayoutError as error:
            raise LayoutError(
                f"{file}: {error}. This version of PEFT lays its tests out differently: adapt FILES in"
                " tests/peft_suite/run.py."
            ) from None
    return source
