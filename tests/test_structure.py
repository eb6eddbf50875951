"""Laws of the package's shape, read from its source: who may import whom, and what importing it costs."""

import ast
import inspect
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import minigpt_pl
from minigpt_pl.models import ModernGPT

PACKAGE = Path(minigpt_pl.__file__).parent
SOURCES = {path.stem: ast.parse(path.read_text("utf-8")) for path in PACKAGE.glob("*.py")}

LIGHT = {"errors", "files", "signals"}
MAY_IMPORT = {
    "errors": "",
    "files": "",
    "signals": "",
    "randomness": "",
    "statistics": "",
    # models
    "dropout": "",
    "attention": "dropout",
    "layers": "attention dropout",
    "moe": "layers",
    "convolution": "attention",
    "models": "attention convolution dropout layers moe",
    "ladder": "attention layers models",
    "decoding": "attention convolution layers models moe",
    "generation": "decoding models randomness",
    "optim": "",
    # text
    "text": "",
    "tokenizer": "text",
    "tokens": "text tokenizer",
    "windows": "randomness tokens",
    "data": "text tokenizer tokens windows",
    # runs
    "checkpoint": "",
    "vetting": "",
    "modules": "checkpoint generation ladder models moe optim vetting",
    "callbacks": "randomness",
    "samples": "callbacks generation",
    "stopping": "callbacks",
    "saving": "callbacks checkpoint",
    "summary": "callbacks stopping",
    "loggers": "checkpoint floors samples summary",
    "run_dir": "checkpoint",
    # commands
    "settings": "data generation loggers modules samples stopping",
    "mistakes": "modules settings",
    "helptext": "settings",
    "training": "callbacks checkpoint data loggers modules run_dir saving stopping summary",
    "cli": "checkpoint data generation helptext loggers mistakes modules run_dir samples settings stopping summary "
    "training vetting",
    "api": "checkpoint generation models modules tokenizer windows",
    "floors": "data",
    "export": "attention checkpoint models modules moe tokenizer",
    "results": "checkpoint data generation models modules settings summary",
    "plans": "checkpoint cli data results settings statistics summary text tokens",
    "findings": "plans results statistics",
    "pictures": "findings results",
    "report": "findings pictures plans results statistics",
    "study": "checkpoint findings floors helptext loggers plans report results",
    "doctor": "cli data floors helptext loggers mistakes models modules optim summary windows",
    "__main__": "cli doctor export floors report study",  # by their names, when a command needs them
    "__init__": "api",
}
"""The package's files, and which others each may import besides the light ones, which all may.

Models and text meet in rooms of commands alone.
"""

MODELS = {
    "dropout",
    "attention",
    "layers",
    "moe",
    "convolution",
    "models",
    "ladder",
    "decoding",
    "generation",
    "optim",
    "modules",
}
TEXTS = {"text", "tokenizer", "tokens", "windows", "data"}
PURE = MODELS - {"modules"} | TEXTS - {"data"} | LIGHT | {"randomness", "statistics"}
HEAVY = {"torch", "lightning", "numpy", "wandb", "jsonargparse", "yaml", "tokenizers", "torchmetrics"}


def imports(tree: ast.Module) -> set[str]:
    """All modules that a source imports, anywhere in it, by their full names."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and node.value in {f"minigpt_pl.{room}" for room in SOURCES}:
            found.add(node.value)  # imported by its name later
    return found


def own_imports(room: str) -> set[str]:
    """The files of the package that one of them imports."""
    parts = [name.split(".") for name in imports(SOURCES[room])]
    return {(part[1] if part[1] in SOURCES else "__init__") for part in parts if part[0] == "minigpt_pl" and part[1:]}


@pytest.mark.parametrize("room", sorted(SOURCES))
def test_a_file_imports_what_the_table_allows(room: str) -> None:
    assert room in MAY_IMPORT, f"{room}.py is new: say in the table what it may import"
    assert own_imports(room) <= LIGHT - {room} | set(MAY_IMPORT[room].split())
    if room == "errors":
        assert not own_imports(room)


def test_the_table_names_files_that_exist_and_runs_one_way() -> None:
    assert MAY_IMPORT.keys() == SOURCES.keys()
    order = list(TopologicalSorter({room: names.split() for room, names in MAY_IMPORT.items()}).static_order())
    assert order.index("layers") < order.index("models") < order.index("modules") < order.index("cli")


def reach(room: str) -> set[str]:
    """A file and all of the package that importing it imports."""
    return {room}.union(*map(reach, own_imports(room)))


@pytest.mark.parametrize("room", sorted(PURE))
def test_models_and_text_know_no_framework(room: str) -> None:
    assert reach(room) <= PURE
    tops = {name.split(".")[0] for name in imports(SOURCES[room])}
    assert not tops & {"lightning", "pytorch_lightning", "wandb", "torchmetrics", "jsonargparse"}


def test_models_and_text_know_nothing_of_each_other() -> None:
    assert not set().union(*map(reach, MODELS)) & TEXTS
    assert not set().union(*map(reach, TEXTS)) & MODELS


@pytest.mark.parametrize("room", sorted(SOURCES))
def test_a_file_says_what_lives_there(room: str) -> None:
    text = ast.get_docstring(SOURCES[room]) or ""
    assert text.splitlines()[:1], f"{room}.py has no docstring"
    assert text.splitlines()[0].endswith((".", "?", ";")), f"{room}.py: a sentence"


@pytest.mark.parametrize("room", sorted(SOURCES))
def test_importing_a_file_does_no_work(room: str) -> None:
    """At top level stand definitions, constants and imports: no call for its effect, no loop."""
    for node in SOURCES[room].body:
        called = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
        assert not called, f"{room}.py:{node.lineno}"
        assert not isinstance(node, (ast.For, ast.While, ast.With)), f"{room}.py:{node.lineno}"


def test_no_file_is_for_odds_and_ends() -> None:
    assert not SOURCES.keys() & {"utils", "util", "common", "helpers", "misc", "tools"}


def test_the_package_and_its_list_of_commands_import_nothing_heavy() -> None:
    code = (
        "import sys, minigpt_pl, minigpt_pl.errors, minigpt_pl.signals, minigpt_pl.__main__ as m; m.main(['--help'])\n"
        "print('imported:', *{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    text, _, imported = done.stdout.partition("imported:")
    assert "usage: minigpt" in text
    assert not HEAVY & set(imported.split())


def test_the_modern_model_stays_small_enough_to_read() -> None:
    assert len(inspect.signature(ModernGPT.__init__).parameters) - 1 <= 16
