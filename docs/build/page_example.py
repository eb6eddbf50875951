"""Writes docs/page.html, the page of a run, and docs/page.png, a picture of it.

`python docs/build/page_example.py runs/first` takes the model of a run. Without a run, the model and the data of the
present docs/page.html are put together again with the present scripts and style. The picture needs chromium.
"""

import base64
import gzip
import json
import re
import sys
from pathlib import Path
from typing import Any

from minigpt_pl.page.build import render_page
from minigpt_pl.page.command import model_page

PAGE = Path(__file__).parents[1] / "page.html"
PICTURE = PAGE.with_suffix(".png")


def parts(page: str) -> tuple[dict[str, Any], list[bytes]]:
    """The data and the weights of a page."""
    found = dict(re.findall(r'id="(payload|weights-\d+)">([^<]*)<', page))
    payload = json.loads(gzip.decompress(base64.b64decode(found.pop("payload"))))
    return payload, [base64.b64decode(found[name]) for name in sorted(found)]


def take_picture() -> None:
    from playwright.sync_api import sync_playwright
    from support.browser import program

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program(), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1180, "height": 620}, color_scheme="light")
        tab.goto(PAGE.as_uri())
        tab.locator(".text span[style]").nth(600).wait_for()
        tab.locator(".text span").nth(241).hover()
        tab.get_by_text("A 5-gram model").wait_for()
        tab.screenshot(path=PICTURE)
        browser.close()


if __name__ == "__main__":
    if sys.argv[1:]:
        payload, weights = model_page([Path(sys.argv[1], "best.ckpt")], "")
    else:
        payload, weights = parts(PAGE.read_text("utf-8"))
    PAGE.write_text(render_page(payload, weights), "utf-8")
    take_picture()
