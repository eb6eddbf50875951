"""Pages in a real browser: Debian's chromium, or Google's, driven by Playwright. Without them these tests are skipped.

Every page that a test opens must show no error and make no request but for itself.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


def program() -> str | None:
    return next((path for path in map(shutil.which, PROGRAMS) if path), None)


@pytest.fixture(scope="module")  # while Playwright runs, asyncio cannot be used
def browser() -> Iterator[Any]:
    """A browser without windows."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    if (path := program()) is None:
        pytest.skip("no chromium is installed: apt install chromium")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def opened(browser: Any, address: Path | str, **options: Any) -> Iterator[Any]:
    """A tab that shows a file or an address; at the end there were no errors and no request to elsewhere."""
    url = address.as_uri() if isinstance(address, Path) else address
    script = options.pop("init_script", None)
    tab = browser.new_page(**{"viewport": WIDE, **options})
    if script:
        tab.add_init_script(script)
    problems: list[str] = []
    tab.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    origin = url if isinstance(address, Path) else url.rstrip("/")

    def check_request(request: Any) -> None:
        if not request.url.startswith((origin, "blob:")):
            problems.append(f"a request for {request.url}")

    tab.on("request", check_request)
    tab.goto(url)
    try:
        yield tab
        assert problems == []
    finally:
        tab.close()
