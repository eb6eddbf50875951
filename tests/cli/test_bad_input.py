"""A user's mistake costs one line: exit status 2, nothing on stdout, no file changed.

The mistakes and their messages are in docs/build/errors_page.py, which writes docs/errors.md.
"""

import os
import random
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import errors_page
import pytest
import torch
from conftest import Outcome
from errors_page import CASES, FIT
from lightning.pytorch.accelerators import AcceleratorRegistry
from support.own_classes import new_python, write_module

from minigpt_pl.cli.options import RESERVED, option_specs

MiniGPT = Callable[..., Outcome]

FILES = {
    "sea.txt": "".join(f"line {i}: the sea comes in, the sea goes out.\n" for i in range(80)),
    "other.txt": "Quite another text, in which JUDGES box quizzically.\n" * 20,
    "short.txt": "hello world",
    "long.txt": "the sea\n" * 45_000,
    "empty.txt": "",
    "blank.txt": " \n\t\n \n ",
    "tiny.yaml": """
        {data: {path: sea.txt, batch_size: 2, eval_every: 1}, wandb: null, trainer: {max_steps: 1},
         model: {init_args: {n_layer: 1, n_head: 2, n_embd: 8, block_size: 16}}}
    """,
    "list.yaml": "- data\n- model\n",
    "broken.yaml": "data: [1, 2\nmodel: }",
    "key.yaml": "data: {bath_size: 5}",
    "type.yaml": "data:\n  batch_size: many\n",
    "null.yaml": "data: {tokenizer: null}",
    "value.yaml": "data:\n  batch_size: 0\n",
    "class.yaml": "model: ModrenLM\n",
    "group.yaml": "trainer: 5\n",
    "none.yaml": "model:\n",
    "follows.yaml": "data: {block_size: 7}\n",
    "experts.yaml": "model: {class_path: ClassicLM, init_args: {n_experts: 4}}\n",
    "place.yaml": "run_dir: run\n",
    "start.yaml": "ckpt_path: run/last.ckpt\n",
    "wrong.yaml": "data: {class_path: my_module.MyDate}\n",
    "failing.py": "x = 1\nx / 0\n",
    "lacking.py": "import my_library\n",
    "taken.py": "import minigpt_pl\n\nclass ModernLM(minigpt_pl.ModernLM):\n    pass\n",
}

PARSER_NOISE = re.compile(
    r"NoneType|Namespace|Union|Traceback|<class|Parser key|argument -|Expected|Subtypes|subcommand|"
    r"\berror: |\.py\b|Errno"
)
"""Words of the parser, of Python and of its libraries, which no message may contain. (init_args only as typed.)"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with good and bad files; `here` adds a trained run."""
    path = tmp_path_factory.mktemp("ground")
    for name, text in FILES.items():
        (path / name).write_text(text, "utf-8")
    (path / "latin.txt").write_bytes("café, not so".encode("latin-1"))
    (path / "utf16.txt").write_bytes("the sea".encode("utf-16"))
    (path / "folder").mkdir()
    os.mkfifo(path / "pipe")
    write_module(path)
    (path / "imported").touch()  # its mark; no message may change a file
    return path


@pytest.fixture
def here(directory: Path, minigpt: MiniGPT, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with a run and checkpoints that cannot be used."""
    monkeypatch.chdir(directory)
    if not Path("run").exists():
        assert minigpt(*shlex.split(FIT), "--run_dir", "run").status == 0
        shutil.copytree("run", "flipped")
        content = Path("run/last.ckpt").read_bytes()
        checkpoint = torch.load("run/last.ckpt")
        start = content.index(checkpoint["state_dict"]["net.norm.weight"].numpy().tobytes())
        Path("flipped/last.ckpt").write_bytes(content[:start] + bytes([content[start] ^ 64]) + content[start + 1 :])
        Path("truncated.ckpt").write_bytes(content[: len(content) // 2])
        torch.save({"state_dict": {"w": torch.ones(3)}, "epoch": 3}, "foreign.ckpt")
        checkpoint["config"]["model"]["class_path"] = "elsewhere.OtherLM"
        torch.save(checkpoint, "own.ckpt")
        checkpoint["settings"] = checkpoint.pop("config")
        torch.save(checkpoint, "old.ckpt")
    with new_python():
        yield directory


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Size and time of each file and directory below a directory."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(directory.rglob("*"))}


def error_message(minigpt: MiniGPT, here: Path, args: list[str]) -> str:
    """Checks that a command fails as it must; returns its message, without `error: `."""
    before = snapshot(here)
    outcome = minigpt(*args)
    assert (outcome.status, outcome.out) == (2, ""), outcome.err
    assert re.fullmatch(r"error: [^\n]+\n", outcome.err), outcome.err
    assert snapshot(here) == before
    message = outcome.err.removeprefix("error: ").rstrip("\n")
    assert not PARSER_NOISE.search(message)
    assert "init_args" not in message or any("init_args" in arg for arg in args)
    return message


@pytest.mark.parametrize("section", CASES)
def test_a_mistake_has_its_message(minigpt: MiniGPT, here: Path, section: str) -> None:
    wrong = []
    for args, expected in CASES[section]:
        message = error_message(minigpt, here, shlex.split(args))
        if not re.fullmatch(re.escape(expected).replace(re.escape("..."), ".*"), message):
            wrong.append(f"{args}: {message}")
    assert not wrong


def test_the_page_of_messages_is_up_to_date() -> None:
    assert len([case for cases in CASES.values() for case in cases]) > 150
    assert errors_page.PAGE.read_text("utf-8") == errors_page.errors_page(), "run python docs/build/errors_page.py"


@pytest.mark.parametrize("name", ["mps", "cuda"])
def test_a_device_that_this_machine_lacks_is_named(minigpt: MiniGPT, here: Path, name: str) -> None:
    if AcceleratorRegistry.get(name).is_available():
        pytest.skip("the device is available")
    message = error_message(minigpt, here, [*shlex.split(FIT), "--trainer.accelerator", name])
    assert re.fullmatch(f"--trainer.accelerator {name}: this machine has cpu.*; auto uses the best of them", message)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_missing_permissions_are_reported(minigpt: MiniGPT, here: Path) -> None:
    shutil.copy("sea.txt", "secret.txt")
    for path, mode in ((Path("secret.txt"), 0), (Path("folder"), 0o500)):
        path.chmod(mode)
    for option, path, problem in (
        ("--data.path", "secret.txt", "it cannot be read (Permission denied); name a text file"),
        ("--run_dir", "folder", "the directory is not writable (Permission denied); use another --run_dir"),
        ("--run_dir", "folder/below", "the directory is not writable (Permission denied); use another --run_dir"),
    ):
        message = error_message(minigpt, here, [*shlex.split(FIT), option, path])
        assert message == f"{option} {path}: {problem}"


def test_a_read_error_is_reported(minigpt: MiniGPT, here: Path) -> None:
    """Root too may not read the start of its own memory."""
    if not Path("/proc/self/mem").exists():
        pytest.skip("there is no /proc")
    message = error_message(minigpt, here, [*shlex.split(FIT), "--data.path", "/proc/self/mem"])
    assert message == "--data.path /proc/self/mem: it cannot be read (Input/output error); name a text file"


def test_the_last_of_several_values_is_named_and_a_default_by_its_bare_name(minigpt: MiniGPT, here: Path) -> None:
    twice = error_message(minigpt, here, [*shlex.split(FIT), "--model.n_head", "4", "--model.n_head=3"])
    assert twice == "--model.n_head 3: it must divide n_embd, 8"
    default = error_message(minigpt, here, ["fit", "--data.path", "sea.txt", "--model.n_embd", "129"])
    assert default == "model.n_head 4: it must divide n_embd, 129"


ODD = (
    "", " ", "null", "~", "nan", "-inf", "0", "-1", "1.5", "1e400", "9" * 30, "true", "x", "é", "a: b", "[1, 2]",
    "{a: 1}", "[", "'", "%s", "${x}", "!!python/name:os.system", "@tiny.yaml", "tiny.yaml", "run", "\n", "-", "=",
    "os.system", "ModernLM",
)  # fmt: skip
"""Values that some option may not expect."""


def mangled(draw: random.Random) -> list[str]:
    """A command line that works, except for one slip: in a name, in a value, or in the order of its arguments."""
    args = [*shlex.split(FIT), "--run_dir", f"runs/{draw.random()}", "--trainer.max_steps", "1"]
    names = [name for name in option_specs("fit") if name not in ("config", "print_config")]
    name = draw.choice([*names, *(f"trainer.{name}" for name in RESERVED)])
    position, slip = draw.randrange(len(args) + 1), draw.randrange(6)
    if slip == 0:
        return [*args, f"--{name}"]
    if slip == 1:
        cut = draw.randrange(len(name))
        return [*args, f"--{name[:cut]}{name[cut + 1 :]}", draw.choice(ODD)]
    if slip == 2:
        return [*args[:position], draw.choice(ODD), *args[position:]]
    return [*args, f"--{name}={draw.choice(ODD)}"]


def unexpected_outcomes(minigpt: MiniGPT, count: int, seed: int) -> list[str]:
    """Those of `count` mangled command lines that neither work nor print one line."""
    draw, wrong = random.Random(seed), []
    for _ in range(count):
        args = mangled(draw)
        try:
            outcome = minigpt(*args)
        except Exception as error:
            outcome = Outcome(1, "", repr(error))
        err = re.sub("^to export a model, .*\n", "", outcome.err)  # a run that begins may say so
        message = err.removeprefix("error: ")
        one_line = re.fullmatch(r"error: [^\n]+\n", err) and not PARSER_NOISE.search(message)
        diverged = outcome.status == 3 and one_line  # a mangled learning rate may be far too high
        if not (outcome.status == 0 or diverged or outcome.status == 2 and one_line and not outcome.out):
            wrong.append(f"{args}: {outcome}")
    return wrong


def test_a_mangled_command_line_works_or_prints_one_line(minigpt: MiniGPT, here: Path) -> None:
    assert unexpected_outcomes(minigpt, 25, seed=1) == []


@pytest.mark.slow
def test_many_mangled_command_lines_work_or_print_one_line(minigpt: MiniGPT, here: Path) -> None:
    assert unexpected_outcomes(minigpt, 2000, seed=2) == []
