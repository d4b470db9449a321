"""A site looked at in headless Chromium: what goes wrong on its pages, at a wide and at a narrow window."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

from ..loopback import Loopback

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = (1280, 390)
TIMERS = 60_000  # milliseconds
LOADING = 120_000  # milliseconds that a page may take where tests share the processor
ERRORS = ("error", "assert")
LOCAL = ("http://localhost", "http://127.", "https://localhost", "file:")

# What a page itself says. Of elements that reach past the window those are named that hold none that does; what lies
# in an element that scrolls by itself, such as a wide table's, reaches past nothing.
LOOK = """
async () => {
  const images = [...document.images];
  for (const image of images) image.loading = 'eager';
  await Promise.all(images.map((image) => image.decode().catch(() => null)));
  const width = document.documentElement.scrollWidth;
  const past = (element) => element.getBoundingClientRect().right > innerWidth + 1;
  const scrolls = (element) => element
    && (getComputedStyle(element).overflowX !== 'visible' || scrolls(element.parentElement));
  const wide = width <= innerWidth + 1 ? [] : [...document.body.querySelectorAll('*')].filter(
    (each) => past(each) && ![...each.children].some(past) && !scrolls(each.parentElement));
  // what reaches past an edge that nothing scrolls to, or is cut off by an element that does not scroll, is lost
  const text = document.querySelector('article') || document.body;
  const inside = [...text.querySelectorAll('*')].filter((each) => each.checkVisibility() && each.clientWidth > 1);
  const hides = (each) => ['hidden', 'clip'].includes(getComputedStyle(each).overflowX);
  const lost = inside.filter((each) => (hides(each) && each.scrollWidth > each.clientWidth + 1)
    || (each.getBoundingClientRect().left < -1 && !scrolls(each.parentElement)));
  return {
    width,
    lost: lost.slice(0, 3).map((each) => each.outerHTML.slice(0, 120)),
    wide: wide.slice(0, 3).map((each) => each.outerHTML.slice(0, 120)),
    nameless: images.filter((image) => !(image.getAttribute('alt') || '').trim()).map((image) => image.src),
    broken: images.filter((image) => !image.naturalWidth).map((image) => image.src),
    anchors: [...document.querySelectorAll('[id], a[name]')].map((each) => each.id || each.name),
    links: [...document.querySelectorAll('a[href], area[href]')].map((each) => each.href),
  };
}
"""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def served(site: Path) -> Iterator[str]:
    """Serve a folder on loopback for as long as the `with` lasts; gives its address, with a slash at its end."""
    with Loopback(functools.partial(_Quiet, directory=str(site))) as server:  # type: ignore[arg-type]
        yield f"{server.url}/"


@contextmanager
def chromium() -> Iterator[Any]:
    """Start a browser for as long as the `with` lasts."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def problems(site: Path, widths: Sequence[int] = WIDTHS) -> list[str]:
    """Open every page of a site at every width.

    Args:
        site: the folder of the built site.
        widths: of the window, in pixels.

    Returns:
        A line for each thing that is wrong: errors on the console, requests that fail or that leave the loopback, now
        or within a minute, pages wider than the window, text that is cut off, images without a description or that do
        not load, links to pages or anchors that are not there or to the writer's own machine.
    """
    found: list[str] = []
    looks: dict[str, dict[str, Any]] = {}
    with served(site) as base, chromium() as browser:
        for width in widths:
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.clock.install()
            _listen(page, base, found)
            for file in sorted(site.rglob("*.html")):
                url = base + file.relative_to(site).as_posix()
                page.goto(url, wait_until="load", timeout=LOADING)
                page.clock.fast_forward(TIMERS)  # what waits for a timer happens now
                look = page.evaluate(LOOK)
                where = f"{url.removeprefix(base)} at {width} px"
                if look["width"] > width + 1:
                    found.append(f"{where}: {look['width']} px wide, by {look['wide']}")
                found += [f"{where}: cut off: {each}" for each in look["lost"]]
                found += [f"{where}: image without a description: {each}" for each in look["nameless"]]
                found += [f"{where}: image that does not load: {each}" for each in look["broken"]]
                looks[url] = look
            page.close()
        found += _dead_links(site, base, looks)
    return list(dict.fromkeys(found))


def _listen(page: Any, base: str, found: list[str]) -> None:
    """Note what a page's scripts and requests do."""

    def where() -> str:
        return page.url.removeprefix(base)

    def leave(route: Any) -> None:
        found.append(f"{where()}: request that leaves the loopback: {route.request.url}")
        route.abort()

    def fail(request: Any) -> None:
        # what is still loading as the next page is opened is given up then; what left is told of already
        if request.url.startswith(base) and request.failure != "net::ERR_ABORTED":
            found.append(f"{where()}: request that fails: {request.url} ({request.failure})")

    def answer(response: Any) -> None:
        if response.status >= 400:
            found.append(f"{where()}: request that fails: {response.url} ({response.status})")

    page.route(lambda url: not url.startswith((base, "data:", "blob:")), leave)
    page.on("requestfailed", fail)
    page.on("response", answer)
    page.on("websocket", lambda socket: found.append(f"{where()}: connection that stays open: {socket.url}"))
    page.on("pageerror", lambda error: found.append(f"{where()}: error in a script: {error}"))
    page.on(
        "console",
        lambda said: found.append(f"{where()}: error on the console: {said.text}") if said.type in ERRORS else None,
    )


def _dead_links(site: Path, base: str, looks: dict[str, dict[str, Any]]) -> Iterator[str]:
    for url, look in looks.items():
        for link in dict.fromkeys(look["links"]):
            target, anchor = urldefrag(link)
            if not target.startswith(base):
                if target.startswith(LOCAL):
                    yield f"{url.removeprefix(base)}: link to a machine of its reader: {link}"
                continue
            target = target + "index.html" if target.endswith("/") else target
            if not (site / unquote(target.removeprefix(base))).is_file():
                yield f"{url.removeprefix(base)}: dead link: {link.removeprefix(base)}"
            elif anchor and target in looks and unquote(anchor) not in looks[target]["anchors"]:
                yield f"{url.removeprefix(base)}: dead anchor: {link.removeprefix(base)}"
