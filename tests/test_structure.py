"""Laws of the package's structure, read from its source: which room may import which, and what importing costs.

The table is the one in docs/architecture.md.
"""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import minigpt_pl

PACKAGE = Path(minigpt_pl.__file__).parent
SOURCES = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")}
MAX_LINES = 300

MAY_IMPORT = {
    "runtime": set(),
    "models": {"runtime"},
    "data": {"runtime"},
    "checkpoint": {"runtime"},
    "generation": {"models", "runtime"},
    "training": {"runtime", "models", "data", "checkpoint", "generation"},
    "cli": {"runtime", "models", "data", "checkpoint", "generation", "training"},
    "experiments": {"runtime", "models", "data", "checkpoint", "generation", "training", "cli"},
    "page": {"runtime", "models", "data", "checkpoint", "generation", "training", "cli"},
}
"""The rooms, and which others each may import. __init__, __main__ and api stand above them."""

FRAMEWORKS = {"lightning", "pytorch_lightning", "wandb"}
MAY_USE_FRAMEWORKS = {"data/datamodule.py", "checkpoint/io.py"}
"""Of the rooms below training."""
PLAIN_ROOMS = {"runtime", "models", "data", "checkpoint", "generation"}
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
    return found


def own_imports(file: str) -> set[str]:
    """The files of the package that one of them imports."""
    found = set()
    for name in imports(SOURCES[file]):
        parts = name.split(".")
        if parts[0] == "minigpt_pl" and len(parts) > 1:
            candidates = ("/".join(parts[1:3]) + ".py", f"{parts[1]}.py", "__init__.py")
            found.add(next(path for path in candidates if path in SOURCES))
    return found - {"__init__.py"}


def forbidden_imports(file: str) -> set[str]:
    """What a file of a room imports from rooms that its own may not import."""
    room = file.split("/")[0]
    return {other for other in own_imports(file) if other.split("/")[0] not in MAY_IMPORT[room] | {room}}


ROOM_FILES = sorted(file for file in SOURCES if "/" in file)


def test_the_rooms_are_those_of_the_table() -> None:
    assert {file.split("/")[0] for file in ROOM_FILES} == MAY_IMPORT.keys()
    assert set(SOURCES) - set(ROOM_FILES) == {"__init__.py", "__main__.py", "api.py"}


@pytest.mark.parametrize("file", ROOM_FILES)
def test_a_room_imports_what_the_table_allows(file: str) -> None:
    assert forbidden_imports(file) == set()


def test_a_forbidden_import_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = ast.parse("from minigpt_pl.training.optim import build_optimizer")
    monkeypatch.setitem(SOURCES, "models/gpt.py", planted)
    assert forbidden_imports("models/gpt.py") == {"training/optim.py"}


def test_files_import_one_way() -> None:
    list(TopologicalSorter({file: own_imports(file) for file in SOURCES}).static_order())


@pytest.mark.parametrize("file", [file for file in ROOM_FILES if file.split("/")[0] in PLAIN_ROOMS])
def test_models_data_and_generation_know_no_framework(file: str) -> None:
    used = {name.split(".")[0] for name in imports(SOURCES[file])}
    assert file in MAY_USE_FRAMEWORKS or not used & FRAMEWORKS


@pytest.mark.parametrize("file", sorted(SOURCES))
def test_a_file_says_what_lives_there_and_is_short(file: str) -> None:
    text = ast.get_docstring(SOURCES[file]) or ""
    assert text.split("\n\n")[0].endswith("."), f"{file}: its docstring begins with a sentence"
    assert len((PACKAGE / file).read_text("utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("file", sorted(SOURCES))
def test_importing_a_file_does_no_work(file: str) -> None:
    """At top level stand definitions, constants and imports: no call for its effect, no loop."""
    for node in SOURCES[file].body:
        called = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
        assert not called, f"{file}:{node.lineno}"
        assert not isinstance(node, (ast.For, ast.While, ast.With)), f"{file}:{node.lineno}"


def test_no_file_is_for_odds_and_ends() -> None:
    assert not {Path(file).stem for file in SOURCES} & {"utils", "util", "common", "helpers", "misc", "tools"}


def test_the_table_in_the_docs_is_this_one() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)/` \|.*\| ([^|]*) \|$", page, re.MULTILINE)
    assert {room: set(re.findall(r"\w+", cell)) for room, cell in rows} == MAY_IMPORT


def test_the_package_and_its_list_of_commands_import_nothing_heavy() -> None:
    code = (
        "import sys, minigpt_pl, minigpt_pl.runtime.errors, minigpt_pl.runtime.signals, minigpt_pl.__main__ as m\n"
        "m.main(['--help']); print('imported:', *{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    text, _, imported = done.stdout.partition("imported:")
    assert "usage: minigpt" in text
    assert not HEAVY & set(imported.split())
