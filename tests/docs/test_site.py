"""The documentation's site: built without a warning, and looked at in a browser."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from subspace_peft import SubspaceConfig

from .browser import CHROMIUM, chromium, problems, served

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built of this checkout."""
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    out = tmp_path_factory.mktemp("site")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    said = [line for line in built.stderr.splitlines() if line.startswith(("WARNING", "ERROR"))]
    assert built.returncode == 0 and not said, built.stderr[-4000:]
    return out


def text_of(page: Path) -> str:
    return unescape(re.sub(r"<[^>]+>", "", page.read_text("utf-8")))


def letters(text: str) -> str:
    return re.sub(r"[^\w'()]", "", text)


def test_every_field_of_the_configuration_is_told_of(site):
    page = letters(text_of(site / "reference" / "api" / "config.html"))
    told = [each for each in fields(SubspaceConfig) if each.init and "help" in each.metadata]
    assert len(told) > 30
    for field in told:
        assert letters(field.metadata["help"]) in page and field.name in page, field.name


def test_the_site_names_no_path_of_this_machine_and_loads_nothing_from_elsewhere(site):
    loads = re.compile(
        r"<(?:script|img|iframe|source)[^>]+src=[\"']?(?:https?:)?//|<link[^>]+href=[\"']?(?:https?:)?//"
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text("utf-8")
        assert not loads.search(text), page.relative_to(site)
        # what a notebook printed may name where it ran
        for secret in (str(ROOT), sys.prefix, str(Path.home()) + "/", "/site-packages/"):
            assert secret not in text, (page.relative_to(site), secret)


@browser
@pytest.mark.timeout(900)
def test_every_page_in_a_browser(site):
    pytest.importorskip("playwright", reason="the extra `dev` is not installed")
    found = problems(site)
    assert not found, "\n".join(found)


def searched(page: Any, words: str) -> str:
    """Search a page by the keyboard as a reader does; gives the address of the first result."""
    page.keyboard.press("/")  # the theme's key for the search, once its scripts listen
    while not page.evaluate("document.activeElement.matches('input.md-search__input')"):
        page.wait_for_timeout(100)
        page.keyboard.press("/")
    page.wait_for_function("document.querySelector('.md-search-result__meta').textContent.includes('Type to start')")
    page.keyboard.type(words)
    result = page.locator(".md-search-result__link").first
    result.wait_for()
    return result.evaluate("link => link.href")


@browser
@pytest.mark.timeout(120)
def test_the_search_puts_first_what_is_meant(site):
    pytest.importorskip("playwright", reason="the extra `dev` is not installed")
    with served(site) as base, chromium() as started:
        page = started.new_page(viewport={"width": 1280, "height": 900})
        for words, expected in (
            ("SubspaceConfig", ""),
            ("KeyError SUBSPACE", "troubleshooting.html"),
            ("k_pattern", "reference/api/building.html"),
        ):
            page.goto(f"{base}how-to/index.html")
            assert searched(page, words).startswith(base + expected)


# -- each of the checks can fail --------------------------------------------------------------------------------------

PAGE = "<!doctype html><html><head><meta name=viewport content='width=device-width'><link rel=icon href='data:,'>"
DOT = "<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'></svg>"
# file → what stands on it, and what is to be said of it; nothing of a page that is as it should be
MADE = {
    "good.html": (
        "<h1 id=top>Good</h1><a href='#top'>up</a><a href='wide.html#x'>on</a><img src=dot.svg alt='a dot'>"
        "<a href='https://example.org/'>elsewhere</a><div style='overflow-x:auto'>"
        "<div style='width:3000px'>-</div></div>",
        [],
    ),
    "wide.html": ("<p id=x style='width:800px'>wide</p>", ["wide.html at 390 px: 8"]),
    "link.html": ("<a href='no.html'>no</a>", ["link.html: dead link: no.html"]),
    "anchor.html": ("<a href='good.html#no'>no</a>", ["anchor.html: dead anchor: good.html#no"]),
    "console.html": ("<script>console.error('oh')</script>", ["console.html: error on the console: oh"]),
    "script.html": ("<script>no()</script>", ["script.html: error in a script: no is not defined"]),
    "missing.html": (
        "<script src='no.js'></script>",
        ["missing.html: request that fails: ", "missing.html: error on"],
    ),
    "outside.html": (
        "<script src='https://example.org/a.js'></script>",
        ["outside.html: request that leaves the loopback: https://example.org/a.js", "outside.html: error on"],
    ),
    "late.html": (
        "<script>setTimeout(() => { fetch('https://example.org/late'); console.assert(false, 'hm') }, 20000)</script>",
        ["late.html: request that leaves the loopback: https://example.org/late", "late.html: error "],
    ),
    "socket.html": (
        "<script>new WebSocket('ws://127.0.0.1:1/x')</script>",
        ["socket.html: connection that stays open: ws://127.0.0.1:1/x", "socket.html: error on the console"],
    ),
    "cut.html": (
        "<div style='overflow:hidden'><div style='width:800px'>-</div></div>",
        ["cut.html at 390 px: cut off: "],
    ),
    "hidden.html": (
        "<style>body { overflow-x: hidden }</style><p style='width:800px'>wide</p>",
        ["hidden.html at 390 px: 8"],
    ),
    "left.html": (
        "<p style='margin-left:-300px'>left</p>",
        ["left.html at 1280 px: cut off: <p", "left.html at 390 px: cut off: <p"],
    ),
    "local.html": (
        "<a href='http://localhost:8000/x'>mine</a>",
        ["local.html: link to a machine of its reader: http://localhost:8000/x"],
    ),
    "nameless.html": (
        "<img src=dot.svg>",
        ["nameless.html at 1280 px: image without", "nameless.html at 390 px: image"],
    ),
    "broken.html": (
        "<img loading=lazy src=no.svg alt=no>",
        [
            "broken.html: request that fails",
            "broken.html: error on",
            "broken.html at 1280 px: image that does not load",
            "broken.html at 390 px: image that does not load",
        ],
    ),
}


@browser
def test_whatever_is_wrong_on_a_page_is_found(tmp_path):
    pytest.importorskip("playwright", reason="the extra `dev` is not installed")
    (tmp_path / "dot.svg").write_text(DOT)
    for name, (body, _) in MADE.items():
        (tmp_path / name).write_text(f"{PAGE}</head><body>{body}</body></html>", encoding="utf-8")
    found = problems(tmp_path)
    for name, (_, expected) in MADE.items():
        said = [line for line in found if line.startswith(name)]
        assert all(any(line.startswith(each) for line in said) for each in expected), (name, said)
        assert all(any(line.startswith(each) for each in expected) for line in said), (name, said)
