"""A real browser, which notes errors and every request to another machine."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Page, sync_playwright

_CHROMIUM = next(filter(None, map(shutil.which, ("google-chrome", "chromium", "chromium-browser"))), None)
_IS_HERE = re.compile(r"(https?://127\.0\.0\.1:|data:|blob:)")
needs_browser = pytest.mark.skipif(_CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")


@contextmanager
def browse(faults: list[str], timeout_ms: float = 120_000) -> Iterator[Callable[..., Page]]:
    """Yield what opens a page in a browser of its own; errors and requests to other machines go to a list."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox", "--disable-gpu"])

        def open_page(address: str, width: int = 1280) -> Page:
            page = browser.new_page(viewport={"width": width, "height": 900}, accept_downloads=True)
            page.set_default_timeout(timeout_ms)
            page.on("console", lambda message: message.type == "error" and faults.append(message.text))
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("dialog", lambda dialog: faults.append(dialog.message))
            page.on("request", lambda request: _IS_HERE.match(request.url) or faults.append(request.url))
            page.goto(address)
            return page

        try:
            yield open_page
        finally:
            browser.close()
