"""Links of Markdown files as they lie in the repository → links that lead somewhere on the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files

log = get_plugin_logger("links")
ROOT = Path(__file__).resolve().parents[2]
# files at the root → the pages that show them; docs/index.md stands for the README
INCLUDED = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
SHOWN = {**INCLUDED, "README.md": "index.md"}
IMAGES = (".svg", ".png")
ERRORS = "reference/api/errors.html"

_FENCED = re.compile(r"^([ ]*)(`{3,}|~{3,}).*?^\1\2[ ]*$", re.MULTILINE | re.DOTALL)
_LINK_OR_CODE = re.compile(
    r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^()\s]+)\)|(?P<ticks>`+)[^`].*?(?P=ticks)"
)


def links_for_site(markdown: str, source: str, page: str, files: Files, config: Any) -> str:
    """Return a page's text with links that work on the site.

    A link to a page of the site leads to that page. An image from elsewhere in the repository is copied into the site.
    Any other file of the repository is named, since the site does not have it. What does not exist is left as it is,
    so that MkDocs warns of it.

    Args:
        markdown: the text.
        source: the file that it is from, from the repository's root.
        page: the page that it becomes, from the site's root.
        files: the site's files; images are added.
        config: MkDocs' configuration.
    """

    def mended(link: re.Match[str]) -> str:
        if link["ticks"]:
            return link[0]
        image, text, target = link["image"], link["text"], link["target"]
        path, hash, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if path in SHOWN:
            place = SHOWN[path]
        elif path.startswith("docs/"):
            place = path.removeprefix("docs/")
        elif not (ROOT / path).exists():
            return link[0]
        elif image and path.endswith(IMAGES):
            place = f"repository/{path}"
            if place not in files.src_uris:
                files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
        else:
            same = text.strip("`") in (path, posixpath.basename(path))
            return f"`{path}`" if same else f"{text} (`{path}`)"
        return f"{image}[{text}]({posixpath.relpath(place, posixpath.dirname(page) or '.')}{hash}{anchor})"

    mended_parts, end = [], 0
    for fenced in _FENCED.finditer(markdown):
        mended_parts += [_LINK_OR_CODE.sub(mended, markdown[end : fenced.start()]), fenced[0]]
        end = fenced.end()
    return "".join([*mended_parts, _LINK_OR_CODE.sub(mended, markdown[end:])])


def notebook_links(html: str, source: str, files: Files) -> str:
    """Return a notebook's page with links to pages, whose sources it names: MkDocs mends those of Markdown only.

    Args:
        html: the page's content.
        source: the notebook, from the site's root.
        files: the site's files; a link to what is not among them is a warning.
    """

    def mended(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link["path"]))
        file = files.get_file_from_path(target)
        if file is None:
            log.warning(f"Notebook '{source}' contains a link '{link['path']}', but there is no such page.")
            return link[0]
        return f'href="{posixpath.relpath(file.url, posixpath.dirname(source))}{link["anchor"] or ""}"'

    return re.sub(r'href="(?P<path>(?![a-z]+:)[^"#]+\.(?:md|ipynb))(?P<anchor>#[^"]*)?"', mended, html)


def error_links(html: str, url: str) -> str:
    """Return a page of the reference with links to the errors that a docstring's module does not import.

    Args:
        html: the page's content.
        url: the page, from the site's root.
    """
    import subspace_peft
    from subspace_peft import errors

    def linked(code: re.Match[str]) -> str:
        if not hasattr(errors, code[1]):
            return code[0]
        module = subspace_peft if code[1] in subspace_peft.__all__ else errors
        place = posixpath.relpath(ERRORS, posixpath.dirname(url))
        return f'<a href="{place}#{module.__name__}.{code[1]}">{code[0]}</a>'

    return re.sub(r"(?<!>)<code>(\w+Error)</code>", linked, html)
