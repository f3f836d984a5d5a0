"""A real browser: the Chromium of this machine, driven by Playwright, without a download of its own.

Playwright's blocking interface leaves an event loop running in its thread, on which asynchronous tests would stumble.
So it lives in a thread of its own, and what a test sees is `Page`, usable from any test.
"""

from __future__ import annotations

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
    """A headless browser with an empty profile; a context manager.

    Args:
        executable: As `find_chromium` gives it.
    """

    def __init__(self, executable: str) -> None:
        self._executable = executable
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="chromium")
        self._playwright: Any = None
        self._browser: Any = None

    def start(self) -> Chromium:
        """Start it; about 2 seconds."""

        def begin() -> None:
            from playwright.sync_api import sync_playwright

            self._playwright = sync_playwright().start()
            self._browser = self._playwright.chromium.launch(executable_path=self._executable, args=list(FLAGS))

        self._thread.submit(begin).result()
        return self

    def stop(self) -> None:
        """End the browser and its pages."""

        def end() -> None:
            if self._browser:
                self._browser.close()
            if self._playwright:
                self._playwright.stop()

        self._thread.submit(end).result()
        self._thread.shutdown()

    def __enter__(self) -> Chromium:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def page(self, *, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        """Return a fresh page, with cookies and storage of its own; a context manager."""

        def make() -> PlaywrightPage:
            context = self._browser.new_context(
                viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
            )
            context.set_default_timeout(30_000)
            return context.new_page()

        return Page(self, self._thread.submit(make).result())

    def run(self, action: Callable[[], T]) -> T:
        """Run `action` on the browser's thread and return what it returns."""
        return self._thread.submit(action).result()


class Page:
    """One page. Waits take at most 30 seconds, then raise Playwright's TimeoutError.

    Selectors are Playwright's: CSS, `text=…`, `role=button[name="Run"]`.

    Attributes:
        requests: The URLs that it asked for.
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
        """Where it is now."""
        return self.raw(lambda page: page.url)

    def wait_for(self, selector: str) -> None:
        """Wait until something visible fits `selector`."""
        self.raw(lambda page: page.locator(selector).first.wait_for(state="visible"))

    def wait_for_text(self, text: str) -> None:
        """Wait until `text` is visible somewhere, upper and lower case alike, white space collapsed."""
        self.raw(lambda page: page.get_by_text(text).first.wait_for(state="visible"))

    def text(self, selector: str = "body") -> str:
        """Return the visible text of the first element that fits."""
        return self.raw(lambda page: page.locator(selector).first.inner_text())

    def count(self, selector: str) -> int:
        """Return how many elements fit now."""
        return self.raw(lambda page: page.locator(selector).count())

    def evaluate(self, script: str, argument: Any = None) -> Any:
        """Run JavaScript in the page: an expression, or a function that gets `argument`; return its value."""
        return self.raw(lambda page: page.evaluate(script, argument))

    def click(self, selector: str) -> None:
        """Click the first element that fits, once it is there and can be clicked."""
        self.raw(lambda page: page.locator(selector).first.click())

    def fill(self, selector: str, text: str) -> None:
        """Replace the text of an input."""
        self.raw(lambda page: page.locator(selector).first.fill(text))

    def screenshot(self, path: Path, *, selector: str | None = None, whole: bool = True) -> Path:
        """Write a PNG of the whole page, of what fits in the window, or of one element; return its path."""
        if selector:
            self.raw(lambda page: page.locator(selector).first.screenshot(path=path))
        else:
            self.raw(lambda page: page.screenshot(path=path, full_page=whole))
        return path

    def close(self) -> None:
        """Close it and forget its cookies."""
        self.raw(lambda page: page.context.close())

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
