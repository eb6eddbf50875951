"""The wheel that users install: its contents, and that it works without this checkout."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import PROJECT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    args = ["wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, PROJECT]
    subprocess.run([sys.executable, "-m", "pip", *args], check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_contains_the_code_the_configs_and_the_text_unchanged(wheel: Path) -> None:
    sources = [*PROJECT.glob("minigpt_pl/**/*.py"), *PROJECT.glob("minigpt_pl/page/assets/*")]
    shipped = [*PROJECT.glob("configs/**/*.yaml"), PROJECT / "data" / "input.txt", PROJECT / "data" / "README.md"]
    expected = {str(path.relative_to(PROJECT)): path for path in sources}
    expected |= {f"minigpt_pl/shipped/{path.relative_to(PROJECT)}": path for path in shipped}
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        assert names == expected.keys()
        assert all(file.read(name) == path.read_bytes() for name, path in expected.items())
        (licence,) = (name for name in file.namelist() if name.endswith("licenses/LICENSE"))
        assert file.read(licence) == (PROJECT / "LICENSE").read_bytes()


@pytest.mark.slow
def test_the_wheel_trains_and_predicts_in_an_empty_directory(wheel: Path, tmp_path: Path, text_file: Path) -> None:
    """In its own environment, which borrows only the packages that ours depends on."""
    home = tmp_path / "environment"
    venv.create(home)
    python = home / "bin" / "python"
    (site,) = home.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"), "utf-8")
    install = ["--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)

    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "my.txt").write_bytes(text_file.read_bytes())
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MINIGPT", "WANDB"))
    }
    environment = inherited | {"HOME": str(tmp_path / "nobody"), "XDG_CACHE_HOME": ""}

    def minigpt(*args: str) -> str:
        process = subprocess.run(
            [home / "bin" / "minigpt", *args],
            cwd=empty, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        return process.stdout

    minigpt("fit", "-c", "smoke", "--data.path", "my.txt", "--run_dir", "run", "--model.block_size", "16")
    minigpt("fit", "-c", "journey/p2_refine", "-c", "smoke", "--trainer.max_steps", "2", "--run_dir", "shipped")
    (empty / "my.txt").unlink()
    for run in ("run", "shipped"):
        output = minigpt("predict", "--ckpt_path", f"{run}/best.ckpt", "--sample.prompt", "the sea")
        assert output.startswith("the sea")
        assert len(output) > 300
    print_path = "import minigpt_pl; print(minigpt_pl.__file__)"
    imported = subprocess.run(
        [python, "-c", print_path], cwd=empty, env=environment, capture_output=True, text=True, check=True
    )
    assert imported.stdout.startswith(str(home)), "the checkout was imported, not the wheel"
