"""Links of Markdown files as they lie in the repository → links that lead somewhere on the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
# files at the root → the pages that show them; docs/index.md stands for the README
INCLUDED = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
SHOWN = {**INCLUDED, "README.md": "index.md"}
IMAGES = (".svg", ".png")

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
            return text if f"`{path}`" == text else f"{text} (`{path}`)"
        return f"{image}[{text}]({posixpath.relpath(place, posixpath.dirname(page) or '.')}{hash}{anchor})"

    mended_parts, end = [], 0
    for fenced in _FENCED.finditer(markdown):
        mended_parts += [_LINK_OR_CODE.sub(mended, markdown[end : fenced.start()]), fenced[0]]
        end = fenced.end()
    return "".join([*mended_parts, _LINK_OR_CODE.sub(mended, markdown[end:])])
