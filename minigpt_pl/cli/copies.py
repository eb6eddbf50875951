"""The command `copies`: how much of what a model writes stands in its training text. The search is in `data.copies`."""

from pathlib import Path

from jsonargparse import ArgumentParser

from minigpt_pl.cli.start import find_start, read_model
from minigpt_pl.data.copies import CopyFinder
from minigpt_pl.generation.generate import SamplingConfig, generate
from minigpt_pl.runtime.errors import UserError

SPANS = (20, 50)
MAX_CHARACTERS = 5_000_000  # of the training text: the last ones; each takes about a hundred bytes of memory
ABOUT = """Generates text, or reads --file, and reports how much of it stands in the training text: the longest span,
and the share of spans of some lengths. The validation text, which the model never saw, has the same figures."""


def run(command: str, args: list[str]) -> int:
    """Runs the command; returns the exit status.

    Raises:
        UserError: If the checkpoint, its text or the file cannot be used.
    """
    parser = ArgumentParser(prog=f"minigpt {command}", exit_on_error=False, description=ABOUT)
    parser.add_argument("--ckpt_path", type=str, default="", help="A file, or best or last in --run_dir.")
    parser.add_argument("--run_dir", type=str, default="", help="Directory of --ckpt_path last and best.")
    parser.add_argument("--data.path", type=str, default="", help="The text, if it is no longer where the run read it.")
    parser.add_argument("--file", type=str, default="", help="A text to examine, instead of what the model writes.")
    parser.add_argument("--sample.prompt", type=str, default="", help="Text to continue. Default: a line break.")
    defaults = {"max_new_tokens": 2000, "num_samples": 5}
    parser.add_class_arguments(SamplingConfig, "sample", fail_untyped=False)
    parser.set_defaults({f"sample.{name}": value for name, value in defaults.items()})
    options = parser.parse_args(args)
    path = find_start(options.ckpt_path or options.run_dir and "best", options.run_dir, command)
    assert path is not None, "only fit may start from nothing"
    _, net, data = read_model(path, options.data.path)
    splits = (data.tokens(split)[-MAX_CHARACTERS:].tolist() for split in ("train", "val"))
    source, validation = map(data.tokenizer.decode, splits)
    if options.file:
        name, text = options.file, read_file(options.file)
    else:
        sample = dict(vars(options.sample))
        prompt = data.tokenizer.encode_prompt(sample.pop("prompt"))
        steps = generate(net, prompt, SamplingConfig(**sample))
        texts = (data.tokenizer.decode(list(stream)) for stream in zip(*steps, strict=True))
        name, text = "what it writes", "\n".join(texts)
    print_table(source, {name: text, "validation text": validation})
    return 0


def read_file(file: str) -> str:
    try:
        return Path(file).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        problem = f"it cannot be read ({getattr(error, 'strerror', None) or 'it is not UTF-8'})"
        raise UserError(problem, option="--file", value=file, remedy="name a text file") from None


def print_table(source: str, texts: dict[str, str]) -> None:
    width = max(map(len, texts)) + 2
    print(f"{'':{width}}{'characters':>11}{'longest':>9}" + "".join(f"{f'spans of {n}':>13}" for n in SPANS))
    longest = {}
    for name, text in texts.items():
        finder = CopyFinder(source, text)
        longest[name] = finder.longest()
        shares = "".join(f"{finder.share(n):13.2%}" for n in SPANS)
        print(f"{name:{width}}{len(text):11,}{len(longest[name]):9,}{shares}")
    for name, span in longest.items():
        print(f"\nthe longest span of {name} that stands in the training text:\n{span!r}")
