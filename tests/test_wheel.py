"""The package as users install it: what the wheel holds, and that it works away from this checkout."""

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
    words = ["wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, PROJECT]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_code_the_configs_and_the_text_as_they_are(wheel: Path) -> None:
    sources = [*PROJECT.glob("minigpt_pl/*.py")]
    shipped = [*PROJECT.glob("configs/**/*.yaml"), PROJECT / "data" / "input.txt", PROJECT / "data" / "README.md"]
    expected = {str(path.relative_to(PROJECT)): path for path in sources}
    expected |= {f"minigpt_pl/shipped/{path.relative_to(PROJECT)}": path for path in shipped}
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name}
        assert held == expected.keys()
        assert all(file.read(name) == path.read_bytes() for name, path in expected.items())
        (licence,) = (name for name in file.namelist() if name.endswith("licenses/LICENSE"))
        assert file.read(licence) == (PROJECT / "LICENSE").read_bytes()


@pytest.mark.slow
def test_the_wheel_trains_and_predicts_in_an_empty_place(wheel: Path, tmp_path: Path, text_file: Path) -> None:
    """In an environment of its own that borrows only the packages that ours depends on."""
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
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MINIGPT", "WANDB"))}
    environment = ours | {"HOME": str(tmp_path / "nobody"), "XDG_CACHE_HOME": ""}

    def minigpt(*words: str) -> str:
        done = subprocess.run(
            [home / "bin" / "minigpt", *words],
            cwd=empty, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    minigpt("fit", "-c", "smoke", "--data.path", "my.txt", "--run_dir", "run", "--model.block_size", "16")
    minigpt("fit", "-c", "journey/p2_refine", "-c", "smoke", "--trainer.max_steps", "2", "--run_dir", "shipped")
    (empty / "my.txt").unlink()
    for run in ("run", "shipped"):
        said = minigpt("predict", "--ckpt_path", f"{run}/best.ckpt", "--sample.prompt", "the sea")
        assert said.startswith("the sea")
        assert len(said) > 300
    where = "import minigpt_pl; print(minigpt_pl.__file__)"
    found = subprocess.run(
        [python, "-c", where], cwd=empty, env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith(str(home)), "the checkout was imported, not the wheel"
