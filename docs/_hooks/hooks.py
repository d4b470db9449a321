"""MkDocs' hooks: pages made from the repository's own files and from the command line's parser.

Nothing that is made here is committed: it exists while the site is built.
"""

from __future__ import annotations

import posixpath
from typing import Any

from command_line import command_line_page
from links import INCLUDED, ROOT, error_links, links_for_site, notebook_links
from mkdocs.structure.files import File, Files

COMMAND_LINE = "reference/command-line.md"
# what a search puts first, and last: a message that is searched for is listed, a name has its reference
BOOST = {
    "troubleshooting.md": 12,
    "how-to/train-a-task.md": 2,
    "reference/api/config.md": 3,
    "reference/api/errors.md": 0.5,
    "evidence.md": 0.5,
    "evidence-tables.md": 0.2,
    "evidence-earlier-tables.md": 0.1,
    "evidence-earlier.md": 0.3,
    "changelog.md": 0.3,
    "architecture.md": 0.5,
}


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
    # the longest that fits, a page before its folder
    boost = next((BOOST[each] for each in sorted(BOOST, key=len, reverse=True) if uri.startswith(each)), None)
    if boost is not None:
        page.meta["search"] = {"boost": boost}
    return markdown if page.file.generated_by else links_for_site(markdown, f"docs/{uri}", uri, files, config)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Mend what pages cannot say themselves: links of notebooks, and errors that docstrings name."""
    uri = page.file.src_uri
    if uri.endswith(".ipynb"):
        name = posixpath.basename(uri)
        offer = f'<p><a href="{name}" download>Download this notebook</a></p>'
        return notebook_links(html, uri, files).replace("</h1>", f"</h1>{offer}", 1)
    return error_links(html, page.url) if uri.startswith("reference/api/") else html
