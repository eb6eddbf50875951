"""The page of a model of the default size: seconds to the first shaded text, tokens per second, the longest freeze."""

from pathlib import Path
from typing import Any

import pytest
from benchmarks.measuring import Report
from support.browser import opened

from minigpt_pl.__main__ import main

pytestmark = pytest.mark.bench
RUNS = 5
OBSERVE = """
    globalThis.longest = 0;
    new PerformanceObserver((list) => list.getEntries().forEach((entry) => {
        globalThis.longest = Math.max(globalThis.longest, entry.duration);
    })).observe({ type: "longtask", buffered: true });
"""


def test_page(report: Report, browser: Any, tmp_path: Path) -> None:
    run, page = tmp_path / "run", tmp_path / "page.html"
    words = ["fit", "--run_dir", str(run), "--trainer.max_steps", "2", "--data.eval_every", "2", "--wandb", "null"]
    assert main(words) == 0
    assert main(["page", "--run_dir", str(run), "--out", str(page)]) == 0
    first, speeds, freezes = [], [], []
    for _ in range(RUNS):
        with opened(browser, page, init_script=OBSERVE) as tab:
            tab.locator(".text span[style]").nth(100).wait_for()
            first.append(tab.evaluate("() => performance.now() / 1000"))
            tab.get_by_role("tab", name="Write").click()
            tab.get_by_role("button", name="Write", exact=True).click()
            status = tab.get_by_text("tokens per second")
            status.wait_for(timeout=60_000)
            speeds.append(float(status.inner_text().split("; ")[1].split()[0].replace(",", "")))
            tab.get_by_role("tab", name="Inside").click()
            tab.get_by_role("tab", name="Learning").click()
            tab.get_by_role("tab", name="Read").click()
            tab.wait_for_timeout(300)
            freezes.append(tab.evaluate("() => globalThis.longest"))
    report.add("size of the page", "MB", {"default model": [page.stat().st_size / 1e6]})
    report.add("from opening to the first shaded text", "s", {"default model": first})
    report.add("generation", "tokens/s", {"default model": speeds})
    report.add("the longest task of the page itself", "ms", {"default model": freezes})
