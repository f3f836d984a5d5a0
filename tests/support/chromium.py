"""A real browser: the Chromium of this machine, driven by Playwright, without a download of its own.

Playwright's blocking interface leaves an event loop running in its thread, on which asynchronous tests would stumble.
So it lives in a thread of its own, and what a test sees is `Page`, usable from any test.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from playwright.sync_api import Page as PlaywrightPage


T = TypeVar("T")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--no-sandbox",  # as root, in a container, there is none to be had
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    # No name but loopback's resolves: neither the browser nor a page that counts its visitors leaves this machine.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find_chromium() -> str | None:
    """Return the path of this machine's Chromium or Chrome, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """A headless browser with an empty profile; a context manager. `executable` is as `find_chromium` gives it."""

    def __init__(self, executable: str) -> None:
        self._executable = executable
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="chromium")
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Chromium:
        def begin() -> Any:
            from playwright.sync_api import sync_playwright

            playwright = self._open.enter_context(sync_playwright())
            launched = playwright.chromium.launch(executable_path=self._executable, args=list(FLAGS))
            return self._open.enter_context(launched)

        self._browser = self.run(begin)
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self._open.close)
        self._thread.shutdown()

    def page(self, *, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        """Return a fresh page, with cookies and storage of its own; a context manager."""

        def make() -> PlaywrightPage:
            size, scheme = {"width": width, "height": height}, "dark" if dark else "light"
            context = self._browser.new_context(viewport=size, color_scheme=scheme)
            context.set_default_timeout(30_000)
            return context.new_page()

        return Page(self, self.run(make))

    def run(self, action: Callable[[], T]) -> T:
        """Run `action` on the browser's thread and return what it returns."""
        return self._thread.submit(action).result()


class Page:
    """One page. Waits take at most 30 seconds, then raise Playwright's TimeoutError. `requests` are the URLs that it
    asked for. Selectors are Playwright's: CSS, `text=…`, `role=button[name="Run"]`; the first that fits counts.
    """

    def __init__(self, browser: Chromium, page: PlaywrightPage) -> None:
        self._browser = browser
        self._page = page
        self.requests: list[str] = []
        browser.run(lambda: page.on("request", lambda request: self.requests.append(request.url)))

    def raw(self, action: Callable[[PlaywrightPage], T]) -> T:
        """Run `action` with Playwright's own page, for what is not here. Nothing of Playwright's may leave it."""
        return self._browser.run(lambda: action(self._page))

    def open(self, url: str) -> None:
        """Open a URL and wait until it is loaded. What its scripts draw later is for `wait_for`."""
        self.raw(lambda page: page.goto(url))

    @property
    def url(self) -> str:
        return self.raw(lambda page: page.url)

    def wait_for(self, selector: str) -> None:
        self.raw(lambda page: page.locator(selector).first.wait_for(state="visible"))

    def wait_for_text(self, text: str) -> None:
        """Wait until `text` is visible somewhere, upper and lower case alike, white space collapsed."""
        self.raw(lambda page: page.get_by_text(text).first.wait_for(state="visible"))

    def text(self, selector: str = "body") -> str:
        return self.raw(lambda page: page.locator(selector).first.inner_text())

    def count(self, selector: str) -> int:
        return self.raw(lambda page: page.locator(selector).count())

    def evaluate(self, script: str, argument: Any = None) -> Any:
        """Run JavaScript in the page: an expression, or a function that gets `argument`; return its value."""
        return self.raw(lambda page: page.evaluate(script, argument))

    def click(self, selector: str) -> None:
        self.raw(lambda page: page.locator(selector).first.click())

    def fill(self, selector: str, text: str) -> None:
        self.raw(lambda page: page.locator(selector).first.fill(text))

    def screenshot(self, path: Path, *, selector: str | None = None, whole: bool = True) -> Path:
        """Write a PNG of the whole page, of what fits in the window, or of one element; return its path."""
        if selector:
            self.raw(lambda page: page.locator(selector).first.screenshot(path=path))
        else:
            self.raw(lambda page: page.screenshot(path=path, full_page=whole))
        return path

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self.raw(lambda page: page.context.close())
