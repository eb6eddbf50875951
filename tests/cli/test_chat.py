"""The commands for looking at what a model writes: chat, line by line, and copies of the training text."""

import io
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import PROJECT, TINY, Outcome

from minigpt_pl import generate, load_checkpoint
from minigpt_pl.api import LoadedModel
from minigpt_pl.cli.chat import Chat

MiniGPT = Callable[..., Outcome]
LINES = [f"the {word} is {other}.\n" for word in ("sea", "boat", "net", "sail") for other in ("calm", "old", "gone")]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from minigpt_pl.__main__ import main

    folder = tmp_path_factory.mktemp("chat")
    (folder / "text.txt").write_text("".join(LINES * 30), "utf-8")
    words = ["fit", *TINY, "--data.path", str(folder / "text.txt"), "--run_dir", str(folder / "run")]
    assert main(words) == 0
    return folder / "run"


@pytest.fixture
def loaded(run_dir: Path) -> LoadedModel:
    return load_checkpoint(run_dir / "best.ckpt")


def talk(loaded: LoadedModel, *lines: str | type[BaseException], out: io.StringIO | None = None) -> list[str]:
    """What a conversation prints, line by line, after the greeting; an exception stands for Ctrl-C."""
    out = out or io.StringIO()
    rest: Iterator[str | type[BaseException]] = iter([*lines, EOFError])

    def read_line(prompt: str) -> str:
        line = next(rest)
        if isinstance(line, str):
            return line
        raise line

    Chat(loaded.model, loaded.tokenizer, out).run(read_line)
    return out.getvalue().splitlines()[1:]


def test_a_line_is_continued_as_by_generate_and_an_empty_one_continues(loaded: LoadedModel) -> None:
    settings = dict(max_new_tokens=12, temperature=0.5, top_k=3, seed=4)
    first = "the sea" + generate(loaded, "the sea", **settings)[0]
    second = first + generate(loaded, first, **settings)[0]
    words = [f"/{name} {value}" for name, value in (("tokens", 12), ("temperature", 0.5), ("top_k", 3), ("seed", 4))]
    assert "\n".join(talk(loaded, *words, "the sea", "")[4:]) + "\n" == f"{first}\n{second}\n\n"


def test_settings_are_shown_and_mistakes_change_nothing(loaded: LoadedModel) -> None:
    lines = talk(loaded, "/temperature", "/temperature -1", "/temperature hot", "/temperature", "/sing", "/surprise")
    assert lines[0] == lines[3] == "temperature is 0.8"
    assert "at least 0" in lines[1]
    assert lines[2] == "error: /temperature hot: it must be a number"
    assert lines[4] == "error: /sing: there is no such command; use /help"
    assert lines[5] == "error: there is no text yet; write a line first"


def test_characters_that_the_model_never_saw_are_named(loaded: LoadedModel) -> None:
    lines = talk(loaded, "/tokens 1", "the \u00fc sea \u20ac")
    assert lines[1] == "left out, because the model never saw them: '\u00fc\u20ac'"
    assert lines[2].startswith("the  sea ")


def test_ctrl_c_stops_the_text_and_not_the_program(loaded: LoadedModel) -> None:
    class Interrupted(io.StringIO):
        """Ctrl-C arrives with the third token."""

        pieces = 0

        def flush(self) -> None:
            self.pieces += 1
            if self.pieces == 5:
                raise KeyboardInterrupt

    lines = talk(loaded, "/tokens 50", "the sea", KeyboardInterrupt, "/seed", out=Interrupted())
    assert lines[-2] == "seed is 1337"
    assert 7 < len(lines[1]) < 15


def test_surprise_is_the_loss_of_each_token(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from minigpt_pl import score

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    plain = talk(loaded, "/tokens 30", "the sea", "/surprise")
    coloured = talk(loaded, "/tokens 30", "the sea", "/surprise", out=Terminal())
    text = "\n".join(plain[1 : plain.index("this terminal has no colours; the most surprising tokens, in nats:")])
    nats = score(loaded, text)
    assert plain[-2] == f"mean {sum(nat for _, nat in nats) / len(nats):.2f} nats per token"
    worst = max(nats, key=lambda pair: pair[1])
    assert plain[-3].startswith(f"{worst[0]!r} {worst[1]:.2f}")
    assert any("\x1b[30;48;5;" in line for line in coloured)
    assert re.sub(r"\x1b\[[\d;]*m", "", "\n".join(coloured)).count(text) == 2


@pytest.mark.e2e
def test_in_a_terminal_ctrl_c_leaves_the_program_running(run_dir: Path) -> None:
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "minigpt_pl", "chat", "--run_dir", str(run_dir)]
    process = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, cwd=PROJECT, start_new_session=True
    )
    seen = b""

    def wait_for(text: bytes) -> None:
        nonlocal seen
        while text not in seen:
            seen += os.read(leader, 4096)
        seen = seen[seen.index(text) + len(text) :]

    wait_for(b"> ")
    os.write(leader, b"/tokens 100000\n")
    wait_for(b"tokens is 100000")
    os.write(leader, b"the sea\n")
    wait_for(b"the sea")
    wait_for(b"the")
    process.send_signal(2)
    wait_for(b"> ")
    os.write(leader, b"/quit\n")
    assert process.wait(60) == 0
    os.close(leader)
    os.close(follower)


def test_copies_finds_what_was_copied(run_dir: Path, minigpt: MiniGPT, tmp_path: Path) -> None:
    copied = "".join(LINES[:4])
    (tmp_path / "mine.txt").write_text(f"ZZZ{copied}ZZZ", "utf-8")
    done = minigpt("copies", "--run_dir", run_dir, "--file", tmp_path / "mine.txt")
    assert done.status == 0, done.err
    table = [line.split() for line in done.out.splitlines()]
    assert table[0][:2] == ["characters", "longest"]
    total = len(copied) + 6
    shares = [f"{max(0, len(copied) - n + 1) / (total - n + 1):.2%}" for n in (20, 50)]
    assert table[1][1:] == [str(total), str(len(copied)), *shares]
    assert repr(copied) in done.out


def test_copies_generates_with_the_given_sampling(run_dir: Path, minigpt: MiniGPT) -> None:
    words = ("copies", "--run_dir", run_dir, "--sample.max_new_tokens", 70, "--sample.num_samples", 2)
    done = minigpt(*words)
    assert done.status == 0, done.err
    assert done.out.splitlines()[1].split()[:4] == ["what", "it", "writes", "141"]
    assert minigpt(*words).out == done.out
    assert minigpt(*words, "--sample.seed", 2).out != done.out
    assert minigpt("copies", "--run_dir", run_dir, "--file", "nowhere.txt").status == 2
