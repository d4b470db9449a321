"""MkDocs' hooks: pages made from the repository's own files and from the command line's parser.

Nothing that is made here is committed: it exists while the site is built.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

from command_line import command_line_page
from links import INCLUDED, ROOT, links_for_site
from mkdocs.structure.files import File, Files

COMMAND_LINE = "reference/command-line.md"
ERRORS = "reference/api/errors.html"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not written by hand."""
    from subspace_peft.cli.main import parser

    files.append(File.generated(config, COMMAND_LINE, content=command_line_page(parser())))
    for source, page in INCLUDED.items():
        file = ROOT / source
        if file.exists():  # where it is missing, the navigation's entry has no page, of which MkDocs warns
            text = file.read_text(encoding="utf-8")
            files.append(File.generated(config, page, content=links_for_site(text, source, page, files, config)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Mend links that lead from `docs/` to other files of the repository."""
    uri = page.file.src_uri
    return markdown if page.file.generated_by else links_for_site(markdown, f"docs/{uri}", uri, files, config)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Link the exceptions that a docstring names under "Raises" where its module does not import them."""
    import subspace_peft
    from subspace_peft import errors

    def linked(code: re.Match[str]) -> str:
        if not hasattr(errors, code[1]):
            return code[0]
        place = posixpath.relpath(ERRORS, posixpath.dirname(page.url))
        package = subspace_peft if code[1] in subspace_peft.__all__ else errors
        return f'<a href="{place}#{package.__name__}.{code[1]}">{code[0]}</a>'

    api = page.file.src_uri.startswith("reference/api/")
    return re.sub(r"(?<!>)<code>(\w+Error)</code>", linked, html) if api else html
