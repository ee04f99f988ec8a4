"""Fixtures for tests in a real browser: Chromium, driven by playwright. They skip where there is none."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect, sync_playwright

from indraquantum.live.server import PageServer, Site

# Pages draw themselves when they please, so tests ask by `expect`, which waits, and don't read an element at once.
expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")  # playwright runs a loop of asyncio in this thread, which other tests can't have
def chromium():
    """A running Chromium. pip installs playwright, but no browser, so a machine may have none."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium is installed (such as `apt install chromium`)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@contextlib.contextmanager
def served(site: Site) -> Iterator[PageServer]:
    """Serve `site` on a free port."""
    server = PageServer("127.0.0.1", 0, site)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def page_of(chromium, url: str, *, width: int = 1280, scheme: str = "light") -> Iterator:
    """Open `url` in a window of its own. At its end there must have been no error and no request to elsewhere."""
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.set_default_timeout(60_000)
    page, problems, asked = context.new_page(), [], []
    page.on("console", lambda message: message.type in ("error", "warning") and problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: (problems.append("a dialog"), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    yield page
    context.close()
    assert problems == []
    base = url.split("#")[0]
    assert [address for address in asked if not address.startswith((base, "data:"))] == []
