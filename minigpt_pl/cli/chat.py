"""The command `chat`: a prompt in the terminal. Each line is continued by the model, as it is generated."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from typing import Any, TextIO

from jsonargparse import ArgumentParser

from minigpt_pl.cli.start import find_start, read_model
from minigpt_pl.data.tokenizer import Tokenizer
from minigpt_pl.generation.generate import SamplingConfig, generate
from minigpt_pl.models.gpt import GPT
from minigpt_pl.runtime import signals
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.training.evaluation import token_nats

PROMPT = "> "
HELP = """A line is a prompt; the model continues it. An empty line continues the last text.
/temperature 0.5   /top_k 20   /top_p 0.9   /seed 1   /tokens 200
                   how the next texts are chosen; without a value, what is set
/surprise          the last text, coloured by how much each token surprised the model, in nats
/help              this text
/quit              ends; so does Ctrl-D. Ctrl-C stops the text."""
SETTINGS = {"temperature": float, "top_k": int, "top_p": float, "seed": int, "tokens": int}
FIELDS = {"tokens": "max_new_tokens"}
COLOURS = (None, 230, 223, 216, 209, 202, 196)
"""Background of a token by its nats, in the 256 colours of xterm: from none to red."""


def run(command: str, args: list[str]) -> int:
    """Runs the command until the input ends; returns the exit status.

    Raises:
        UserError: If the checkpoint cannot be used.
    """
    parser = ArgumentParser(
        prog=f"minigpt {command}", exit_on_error=False, description="Writes with a model, line by line."
    )
    parser.add_argument("--ckpt_path", type=str, default="", help="A file, or best or last in --run_dir.")
    parser.add_argument("--run_dir", type=str, default="", help="Directory of --ckpt_path last and best.")
    options = parser.parse_args(args)
    path = find_start(options.ckpt_path or options.run_dir and "best", options.run_dir, command)
    assert path is not None, "only fit may start from nothing"
    if sys.stdin.isatty():
        with suppress(ImportError):  # Windows has none
            import_module("readline")  # input() then has a history, and its line can be edited
    _, net, data = read_model(path, "")
    with signals.keyboard_interrupts():
        Chat(net, data.tokenizer, sys.stdout).run(input)
    return 0


class Chat:
    """A conversation with a model.

    Args:
        model: In eval mode.
        tokenizer: The model's.
        out: Where texts and answers go.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, out: TextIO):
        self.model, self.tokenizer, self.out = model, tokenizer, out
        self.sampling = SamplingConfig(max_new_tokens=200)
        self.text = ""

    def run(self, read_line: Callable[[str], str]) -> None:
        """Answers lines until EOFError or /quit. KeyboardInterrupt stops a text, or clears the line."""
        self.say("/help lists the commands, /quit ends")
        while True:
            try:
                line = read_line(PROMPT)
                if line.strip() == "/quit":
                    break
                self.command(*line[1:].split(maxsplit=1)) if line.startswith("/") else self.write(line)
            except EOFError:
                self.say("")
                break
            except KeyboardInterrupt:
                self.say("")
            except UserError as error:
                self.say(f"error: {error}")

    def say(self, line: str) -> None:
        print(line, file=self.out, flush=True)

    def command(self, name: str = "", value: str = "") -> None:
        """A line that begins with a slash."""
        if name == "help":
            self.say(HELP)
        elif name == "surprise":
            self.surprise()
        elif name not in SETTINGS:
            raise UserError(f"/{name}: there is no such command", remedy="use /help")
        else:
            field = FIELDS.get(name, name)
            if value:
                try:
                    number = SETTINGS[name](value)
                except ValueError:
                    raise UserError(f"/{name} {value}: it must be a number") from None
                self.sampling = replace(self.sampling, **{field: number})
            self.say(f"{name} is {getattr(self.sampling, field)}")

    def write(self, line: str) -> None:
        """Continues a line, or the last text if it is empty."""
        known, prompt = set("".join(self.tokenizer.vocabulary)), line or self.text
        if unknown := "".join(dict.fromkeys(c for c in prompt if c not in known)):
            self.say(f"left out, because the model never saw them: {unknown!r}")
        self.text = "".join(c for c in prompt if c in known)
        ids = self.tokenizer.encode_prompt(self.text)
        self.out.write(self.text)
        for (token,) in generate(self.model, ids, self.sampling):
            piece = self.tokenizer.decode([token])
            self.text += piece
            self.out.write(piece)
            self.out.flush()
        self.say("")

    def surprise(self) -> None:
        """The last text in colours; where there are none, its most surprising tokens."""
        ids = self.tokenizer.encode(self.text)
        if len(ids) < 2:
            raise UserError("there is no text yet", remedy="write a line first")
        nats = token_nats(self.model, ids, self.tokenizer.token_lengths)
        tokens = [(self.tokenizer.vocabulary[i], nat) for i, nat in zip(ids[1:], nats, strict=True)]
        if has_colours(self.out):
            self.say(self.tokenizer.vocabulary[ids[0]] + "".join(colour(*pair) for pair in tokens))
            self.say("nats: " + "".join(colour(f" {value} ", value) for value in range(len(COLOURS))))
        else:
            most = sorted(tokens, key=lambda pair: -pair[1])[:10]
            self.say("this terminal has no colours; the most surprising tokens, in nats:")
            self.say("  ".join(f"{token!r} {nat:.2f}" for token, nat in most))
        self.say(f"mean {sum(nats) / len(nats):.2f} nats per token")


def has_colours(out: Any) -> bool:
    """Whether a terminal shows colours; https://no-color.org is respected."""
    return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def colour(token: str, nats: float) -> str:
    background = COLOURS[min(int(nats), len(COLOURS) - 1)]
    return token if background is None else f"\x1b[30;48;5;{background}m{token}\x1b[0m"
