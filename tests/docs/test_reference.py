"""The reference's pages against what they are a reference of: public names, and the command line's verbs and flags."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import subspace_peft
from subspace_peft import errors
from subspace_peft.cli.main import parser

DOCS = Path(__file__).parents[2] / "docs"
DIRECTIVE = re.compile(r"^::: (subspace_peft(?:\.\w+)+)$", re.MULTILINE)


def hook(name: str) -> ModuleType:
    """Import a module of the site's hooks, as MkDocs does."""
    sys.path.insert(0, str(DOCS / "_hooks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(DOCS / "_hooks"))


def identity(path: str) -> str:
    """Return by which name the source defines what a public name stands for: two names may be of one object."""
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    return f"{found.__module__}.{found.__qualname__}" if hasattr(found, "__qualname__") else path


def public_names() -> Iterator[str]:
    """Yield every name that the package or what lies in it has in `__all__`, and the public exceptions."""
    inside = [each.name for each in pkgutil.iter_modules(subspace_peft.__path__) if not each.name.startswith("_")]
    for module in [subspace_peft, *(importlib.import_module(f"subspace_peft.{name}") for name in inside)]:
        yield from (f"{module.__name__}.{name}" for name in getattr(module, "__all__", ()))
    yield from (f"{errors.__name__}.{name}" for name, each in vars(errors).items() if isinstance(each, type))


def test_every_public_name_is_documented_once():
    written = [path for page in sorted(DOCS.rglob("*.md")) for path in DIRECTIVE.findall(page.read_text("utf-8"))]
    documented = Counter(identity(path) for path in written)
    assert len(documented) > 80
    twice = sorted(name for name, times in documented.items() if times > 1)
    assert not twice, f"documented more than once in docs/reference/api: {twice}"
    public = {identity(name): name for name in public_names()}
    missing = sorted(name for each, name in public.items() if each not in documented)
    assert not missing, f"add `::: {missing[0]}` to the page of its subject in docs/reference/api; all: {missing}"
    private = sorted(set(documented) - set(public))
    assert not private, f"documented in docs/reference/api, but in no `__all__`: {private}"
    # griffe takes `subspace_peft.hotswap` for the module of that name, so there the function's own path has to stand
    own = {path.rpartition(".")[2]: path for path in written if path.count(".") > 1}
    longer = [path for name, path in own.items() if name in subspace_peft.__all__ and f".{name}.{name}" not in path]
    assert not longer, f"in subspace_peft itself, so document them by that path: {longer}"
    for path in written:
        file = DOCS.parent / path.replace(".", "/")
        assert not file.with_suffix(".py").exists() and not file.is_dir(), f"{path} is a module: name what is in it"


# -- the command line -------------------------------------------------------------------------------------------------


def verbs(top: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield every verb's parser, nested ones too."""
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield verb
                yield from verbs(verb)


def test_every_verb_and_flag_is_on_the_page():
    page = hook("command_line").command_line_page(parser())
    sections = dict(zip(*[iter(re.split(r"^#+ .* \{#([\w-]+)\}$", page, flags=re.MULTILINE)[1:])] * 2, strict=True))
    found = list(verbs(parser()))
    assert len(found) > 20 and len(sections) == len(found)
    for verb in found:
        section = sections[verb.prog.partition(" ")[2].replace(" ", "-")]
        for action in verb._actions:
            for flag in action.option_strings:
                shown = re.search(rf"<dt[^>]*>.*<code>{re.escape(flag)}[ <]", section)
                assert shown or flag in ("-h", "--help") or action.help == argparse.SUPPRESS, (verb.prog, flag)
            if action.help and action.help != argparse.SUPPRESS and "%" not in action.help:
                assert re.sub(r"\W", "", action.help)[:20] in re.sub(r"<[^>]+>|\W", "", section) or "-h" in (
                    action.option_strings
                ), (verb.prog, action.dest)


def made_parser(**kwargs: Any) -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("prog", **kwargs)
    verbs = top.add_subparsers()
    verb = verbs.add_parser("verb", help="do <this>")
    verbs.groups = {"some work": ["verb"]}
    top.epilog = "see `prog verb`"
    group = verb.add_argument_group("how much", "of all")
    group.add_argument(
        "-n", "--count", type=int, default=7, metavar="N", help="how many, 100%% or `more`: %(default)s"
    )
    group.add_argument("--hidden", help=argparse.SUPPRESS)
    verb.add_argument("place", nargs="+", help="where, see --count")
    verb.epilog = "examples:\n  prog verb <a>"
    return top


def test_the_page_shows_what_the_help_says():
    page = hook("command_line").command_line_page(made_parser())
    assert "<p>Do &lt;this&gt;.</p>" in page and "<p>see <code>prog verb</code></p>" in page
    assert "## Some work" in page and "### verb {#verb}" in page
    assert "<strong>How much</strong>" in page and "<p>of all</p>" in page
    assert "<code>-n N</code>, <code>--count N</code>" in page and "how many, 100% or <code>more</code>: 7" in page
    assert "<code>place</code>" in page and "where, see <code>--count</code>" in page
    assert "examples:\n  prog verb <a>" in page and "hidden" not in page


# -- links ------------------------------------------------------------------------------------------------------------


class Files(list):
    src_uris = property(lambda self: {each.src_uri for each in self})

    def get_file_from_path(self, path: str) -> Any:
        return SimpleNamespace(url=f"{path.rpartition('.')[0]}.html") if path in self else None


@pytest.mark.parametrize(
    ("source", "page", "written", "mended"),
    [
        ("CHANGELOG.md", "changelog.md", "[a](docs/how-to/x.md#y)", "[a](how-to/x.md#y)"),
        ("CHANGELOG.md", "changelog.md", "[a](CONTRIBUTING.md#tests)", "[a](contributing.md#tests)"),
        ("CHANGELOG.md", "changelog.md", "[a](README.md) and [b](docs/b.md)", "[a](index.md) and [b](b.md)"),
        ("CONTRIBUTING.md", "contributing.md", "[`Makefile`](Makefile)", "`Makefile`"),
        ("CONTRIBUTING.md", "contributing.md", "[pyproject.toml](pyproject.toml)", "`pyproject.toml`"),
        ("CONTRIBUTING.md", "contributing.md", "[the targets](Makefile)", "the targets (`Makefile`)"),
        ("docs/how-to/a.md", "how-to/a.md", "[a](../concepts.md#b)", "[a](../concepts.md#b)"),
        ("docs/how-to/a.md", "how-to/a.md", "[a](../../CHANGELOG.md)", "[a](../changelog.md)"),
        ("docs/how-to/a.md", "how-to/a.md", "[a](../../no/such.md)", "[a](../../no/such.md)"),
        ("docs/a.md", "a.md", "[a](#b) [b](https://arxiv.org/abs/1)", "[a](#b) [b](https://arxiv.org/abs/1)"),
        ("CHANGELOG.md", "changelog.md", "`[a](docs/a.md)`", "`[a](docs/a.md)`"),
        ("CHANGELOG.md", "changelog.md", "```\n[a](docs/a.md)\n```", "```\n[a](docs/a.md)\n```"),
    ],
)
def test_links_lead_somewhere_on_the_site(source, page, written, mended):
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    assert hook("links").links_for_site(written, source, page, Files(), None) == mended


def test_a_notebooks_links_lead_to_pages(caplog):
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    links, files = hook("links"), Files(["concepts.md", "tutorials/2.ipynb"])
    written = '<a href="../concepts.md#energy">a</a><a href="2.ipynb">b</a><a href="https://arxiv.org/a.md">c</a>'
    mended = '<a href="../concepts.html#energy">a</a><a href="2.html">b</a><a href="https://arxiv.org/a.md">c</a>'
    assert links.notebook_links(written, "tutorials/1.ipynb", files) == mended and not caplog.records
    assert links.notebook_links('<a href="../no.md">', "tutorials/1.ipynb", files) == '<a href="../no.md">'
    assert "'../no.md'" in caplog.text


def test_the_errors_that_a_docstring_names_are_linked():
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    linked = hook("links").error_links("<code>SourceError</code> <code>KeyError</code>", "reference/api/bases.html")
    assert linked == (
        '<a href="errors.html#subspace_peft.errors.SourceError"><code>SourceError</code></a> <code>KeyError</code>'
    )
