"""--tensorboard true: the event files hold what metrics.csv and samples.txt hold, also after a kill and a resume."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from conftest import Outcome
from support.runs import SMALL, at_micro_batch, rows_of, snapshot

from minigpt_pl.runtime.atomic_io import TENSORBOARD_DIR
from minigpt_pl.training.by_products import read_samples

SAMPLED = ("--samples.every_n_evals", 1, "--samples.max_new_tokens", 8, "--samples.prompt", "sea\n\nsea")


def events(run: Path) -> tuple[dict[tuple[str, str], float], list[tuple[int, str]]]:
    """All scalars by step and name, and all samples, as TensorBoard itself reads them; each once."""
    accumulator = import_module("tensorboard.backend.event_processing.event_accumulator")  # typed nowhere
    reader = accumulator.EventAccumulator(str(run / TENSORBOARD_DIR), size_guidance={"scalars": 0, "tensors": 0})
    reader.Reload()
    found = [(str(e.step), name, e.value) for name in reader.Tags()["scalars"] for e in reader.Scalars(name)]
    assert len({(step, name) for step, name, _ in found}) == len(found), "a row stands there twice"
    texts = [(e.step, e.tensor_proto.string_val[0].decode()) for e in reader.Tensors("samples/text_summary")]
    samples = [(step, "\n".join(line[4:] for line in text.split("\n"))) for step, text in texts]
    return {(step, name): value for step, name, value in found}, samples


def expected(run: Path) -> dict[tuple[str, str], object]:
    cells = ((row["step"], name, text) for row in rows_of(run) for name, text in row.items())
    return {(s, name): pytest.approx(float(x), rel=1e-6) for s, name, x in cells if x and name not in ("step", "split")}


def test_a_killed_and_a_longer_run_show_each_row_and_each_sample_once(
    minigpt: Callable[..., Outcome], tmp_path: Path, text_file: Path
) -> None:
    """The killed start has logged steps that are trained again, and the longer one drops the evaluation of step 16."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    fit = ("fit", *SMALL, *SAMPLED, "--data.path", text_file, "--tensorboard", "true", "--run_dir", whole)
    with at_micro_batch(12, snapshot(whole, run)):
        assert minigpt(*fit).status == 0
    assert {row["step"] for row in rows_of(run)} > {"9", "10"}
    for longer in ((), ("--trainer.max_steps", 20)):
        assert minigpt("fit", "--run_dir", run, "--ckpt_path", "last", *longer).status == 0
    scalars, samples = events(run)
    assert scalars == expected(run)
    assert sorted({int(step) for step, _ in scalars}) == [3, 5, 6, 9, 10, 12, 15, 18, 20]
    assert samples == read_samples(run / "samples.txt")
    assert [step for step, _ in samples] == [5, 10, 15, 20]
    assert samples[0][1].startswith("sea\n\n")
    scalars, samples = events(whole)
    assert (scalars, samples) == (expected(whole), read_samples(whole / "samples.txt"))


def test_without_the_package_one_line_says_what_to_install(
    minigpt: Callable[..., Outcome], tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith(("torch.utils.tensorboard", "tensorboard."))]:
        monkeypatch.delitem(sys.modules, name)
    fit = ("fit", *SMALL, "--data.path", text_file, "--run_dir", tmp_path / "run", "--tensorboard", "true")
    done = minigpt(*fit)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("error: --tensorboard true: the package tensorboard cannot be imported (")
    assert done.err.endswith('pip install "minigpt_pl[tensorboard]", or use --tensorboard false\n')
    assert done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()
