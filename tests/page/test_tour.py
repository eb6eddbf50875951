"""The page as a user meets it: all views of two small runs, texts that could break a page, runs that still train."""

import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome
from support.browser import NARROW, opened

from minigpt_pl.page.build import render_page
from minigpt_pl.page.command import runs_page
from minigpt_pl.page.server import PageServer

MiniGPT = Callable[..., Outcome]
FIT = ("fit", "-c", "smoke", "--wandb", "null", "--trainer.enable_progress_bar", "false", "--model.block_size", 32)
WORDS = ["the sea ", "a boat ", "comes home.\n", "CAPTAIN:\n", "is calm, ", "at night ", "we sail\n"]
MARKUP = "</script><script>hacked=1</script><img src=x onerror=hacked=1>"
HOSTILE = f"{MARKUP}\u202eabc\u202c\u200f\0 & &amp; \U0001f40b \u05d0\u05d1\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(WORDS[(i * i + i // 3) % len(WORDS)] for i in range(700)), "utf-8")
    return path


@pytest.fixture(scope="module")
def runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of the same text, one with experts."""
    from minigpt_pl.__main__ import main

    folder = tmp_path_factory.mktemp("runs")
    for name, options in {"experts": ("-c", "moe"), "dense": ("--model.n_embd", "16")}.items():
        words = [*FIT, "--data.path", text, "--run_dir", folder / name, *options]
        assert main([str(word) for word in words]) == 0
    return folder


def panel(tab: Any, name: str) -> Any:
    """The view of a tab, which is opened."""
    tab.get_by_role("tab", name=name, exact=True).click()
    return tab.get_by_role("tabpanel")


def test_the_whole_tour(runs: Path, browser: Any, tmp_path: Path, minigpt: MiniGPT) -> None:
    page = tmp_path / "page.html"
    done = minigpt("page", "--run_dir", runs / "experts", "--compare", runs / "dense/best.ckpt", "--out", page)
    assert done.status == 0, done.err
    loss = json.loads((runs / "experts/summary.json").read_text())["best_val"]
    with opened(browser, page) as tab:
        read = panel(tab, "Read")
        tab.get_by_text("tokens; mean surprise").wait_for()  # all windows are read
        shown = float(read.locator(".status").first.inner_text().split("mean surprise ")[1].split()[0])
        assert abs(shown - loss) < 2e-3  # float16 weights
        token = read.locator(".text span").nth(40)
        token.hover()
        details = read.locator(".details")
        details.get_by_text("A 5-gram model").wait_for()
        assert details.locator("ol").first.locator("li").count() == 10
        assert "expert" in details.inner_text()
        before = token.evaluate("(span) => span.style.backgroundColor")
        for mode in ("entropy", "expert", "difference", "copied"):
            read.get_by_label("Shade by").select_option(mode)
            colored = read.locator(".text span[style*=background]").count()
            assert colored > 20, mode
        assert read.locator(".text .mark").count() > 100  # this text repeats itself
        read.get_by_label("Shade by").select_option("surprise")
        assert token.evaluate("(span) => span.style.backgroundColor") == before
        read.locator(".text").focus()
        read.locator(".text").press("End")
        last = read.locator(".text span").last
        assert "selected" in (last.get_attribute("class") or "")
        read.get_by_text("Read another text").click()
        read.get_by_label("A text of your own").fill("the sea \u00fc is calm")
        read.get_by_role("button", name="Read it").click()
        read.get_by_text("Left out, because the model never saw them: \u00fc").wait_for()
        assert "the sea  is calm" in read.locator(".text").inner_text().replace("\u00a0", " ")

        write = panel(tab, "Write")
        write.get_by_label("Prompt").fill("the sea ")
        write.get_by_label("Tokens").fill("40")
        write.get_by_role("button", name="Write", exact=True).click()
        write.get_by_text("40 tokens;").wait_for()
        first = write.locator(".text").inner_text()
        assert first.startswith("the sea ")
        write.locator(".text span").nth(20).click()
        other = write.locator(".details button").first
        chosen = other.locator("b").inner_text()
        other.click()
        write.get_by_text("53 tokens;").wait_for()  # 13 of the old text, and 40 new ones
        branched = write.locator(".text span").nth(20)
        assert branched.text_content().replace("\n", "").replace(" ", "\u2423") == chosen
        write.get_by_role("button", name="1 (left at token 13)").click()
        wait_for_text(write.locator(".text"), first)
        write.get_by_role("button", name="Clear").click()
        wait_for_text(write.locator(".text"), "")

        inside = panel(tab, "Inside")
        inside.get_by_text("The router's probabilities").wait_for()
        assert inside.locator(".head").count() == sum(len(layer) for layer in heads(tab))
        inside.locator(".head").first.click()
        assert inside.locator(".head").first.get_attribute("aria-pressed") == "true"
        assert inside.locator(".favourites tr").count() == 5  # a heading and four experts

        learning = panel(tab, "Learning")
        assert learning.locator("svg").count() >= 4
        slider = learning.get_by_label("Sample")
        newest = learning.locator(".sample").inner_text()
        slider.fill("0")
        assert learning.locator(".sample").inner_text() != newest

        compared = panel(tab, "Runs")
        compared.get_by_role("button", name="best val/loss").click()
        column = compared.locator("tbody tr td:nth-child(4)").all_inner_texts()
        assert column == sorted(column, key=float)
        assert "model.n_embd" in compared.locator("thead").inner_text()


def wait_for_text(element: Any, text: str) -> None:
    for _ in range(100):
        if element.inner_text() == text:
            return
        element.page.wait_for_timeout(50)
    assert element.inner_text() == text


def heads(tab: Any) -> list[list[int]]:
    with_attention = "minigpt.models[0].spec.blocks.filter((block) => block.norm_1)"
    return tab.evaluate(f"() => {with_attention}.map(() => Array(minigpt.models[0].spec.n_head).fill(0))")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_page_does_not_scroll_sideways(
    scheme: Any, runs: Path, browser: Any, tmp_path: Path, minigpt: MiniGPT
) -> None:
    words = (
        "page",
        "--run_dir",
        runs / "experts",
        "--compare",
        runs / "dense/best.ckpt",
        "--out",
        tmp_path / "page.html",
    )
    assert minigpt(*words).status == 0
    with opened(browser, tmp_path / "page.html", viewport=NARROW, color_scheme=scheme) as tab:
        for name in ("Read", "Write", "Inside", "Learning", "Runs"):
            panel(tab, name)
            tab.wait_for_timeout(100)
            assert tab.evaluate("() => document.documentElement.scrollWidth") <= NARROW["width"], name


def test_any_text_is_shown_as_text(browser: Any, tmp_path: Path, minigpt: MiniGPT) -> None:
    many = "".join(map(chr, range(0x4E00, 0x4E00 + 20_000))) + "".join(map(chr, range(0xAC00, 0xAC00 + 10_000)))
    (tmp_path / "text.txt").write_text(many + HOSTILE * 60, "utf-8")
    sizes = ("--model.n_embd", 16, "--trainer.max_steps", 2, "--data.eval_every", 2, "--samples.every_n_evals", 1)
    run = tmp_path / "<img src=x onerror=hacked=1>"
    done = minigpt(*FIT, *sizes, "--data.path", tmp_path / "text.txt", "--run_dir", run)
    assert done.status == 0, done.err
    (run / "samples.txt").write_text(f"=== step 2\n{HOSTILE}\n", "utf-8")
    assert minigpt("page", "--run_dir", run, "--out", tmp_path / "page.html").status == 0
    with opened(browser, tmp_path / "page.html") as tab:
        tab.locator(".text span[style]").first.wait_for()
        shown = "".join(tab.locator(".text span").all_text_contents())
        assert MARKUP in shown
        assert "\u27e8U+202E\u27e9abc\u27e8U+202C\u27e9\u27e8U+200F\u27e9\u2400 & &amp; \U0001f40b" in shown
        learning = panel(tab, "Learning")
        assert "<img src=x onerror=hacked=1>" in learning.locator(".sample").text_content()
        assert tab.locator("h1").text_content().startswith("<img src=x")
        assert tab.evaluate("() => [typeof hacked, document.images.length, document.scripts.length]") == [
            "undefined",
            0,
            4,
        ]


def test_the_policy_of_the_page_forbids_requests_and_other_scripts(
    runs: Path, browser: Any, tmp_path: Path, minigpt: MiniGPT
) -> None:
    assert minigpt("page", runs, "--out", tmp_path / "page.html").status == 0
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(1)
        tab = browser.new_page()
        tab.goto((tmp_path / "page.html").as_uri())
        script = """async (address) => {
            const script = document.createElement("script");
            script.textContent = "hacked = 1";
            document.body.append(script);
            new Image().src = address;
            await fetch(address, { signal: AbortSignal.timeout(500) }).catch(() => 0);
            return typeof hacked;
        }"""
        assert tab.evaluate(script, f"http://127.0.0.1:{listener.getsockname()[1]}/") == "undefined"
        with pytest.raises(TimeoutError):
            listener.accept()
        tab.close()


# Runs that still train.


@pytest.fixture
def server(runs: Path) -> Iterator[PageServer]:
    page = PageServer(
        0, lambda: render_page(runs_page([str(runs)], live=True), []), lambda: runs_page([str(runs)], True)["runs"]
    )
    threading.Thread(target=page.serve_forever, daemon=True).start()
    yield page
    page.shutdown()
    page.server_close()


def status(server: PageServer, path: str, host: str | None = None) -> int:
    address = f"http://127.0.0.1:{server.server_port}{path}"
    request = urllib.request.Request(address, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_server_answers_only_its_machine_and_only_the_page(server: PageServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert status(server, "/data.json") == 200
    for host in ("evil.example", f"evil.example:{server.server_port}", f"127.0.0.1.evil.example:{server.server_port}"):
        assert status(server, "/", host) == 403, host
    for path in ("/experts/config.yaml", "/../experts/best.ckpt", "/%2e%2e/text.txt", "/favicon.ico", "/data.json/"):
        assert status(server, path) == 404, path


def test_the_page_follows_runs_that_train(server: PageServer, runs: Path, browser: Any) -> None:
    metrics = runs / "dense/metrics.csv"
    before = metrics.read_bytes()
    try:
        with opened(browser, f"http://127.0.0.1:{server.server_port}/") as tab:
            row = tab.locator("tbody tr", has_text="dense")
            assert "completed" in row.inner_text()
            header = before.decode().splitlines()[0].split(",")
            values = {"step": "7777", "split": "val", "val/loss": "0.125", "val/nats_per_char": "0.125"}
            new = ",".join(values.get(name, "") for name in header)
            metrics.write_bytes(before + f"{new}\n8888,tr".encode())  # the next line is being written
            row.get_by_text("7,777").first.wait_for()
            assert "0.125" in row.inner_text()
            assert "not ended" in row.inner_text()
    finally:
        metrics.write_bytes(before)
