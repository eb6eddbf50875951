"""`--teachers`: what is minimised, what stays as it is without them, and which teachers are refused."""

import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from support.runs import SMALL, at_micro_batch, differences, interrupt, rows_of, summary

from minigpt_pl import ModernLM, TextDataModule
from minigpt_pl.__main__ import main
from minigpt_pl.checkpoint.io import read_checkpoint
from minigpt_pl.training.distillation import Distillation
from minigpt_pl.training.lit_modules import from_checkpoint

WEIGHT = 0.3


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers of one text, of different sizes, and one of another text."""
    home = tmp_path_factory.mktemp("distillation")
    lines = [f"line {i}: the sea comes in, the sea goes out.\n" for i in range(60)]
    (home / "text.txt").write_text("".join(lines), "utf-8")
    (home / "other.txt").write_text("".join(lines).upper(), "utf-8")
    for name, *options in (
        ("one",),
        ("two", "--model", "ClassicLM", "--model.n_layer", 2, "--seed_everything", 7),
        ("other", "--data.path", home / "other.txt"),
        ("short", "--model.block_size", 8),
    ):
        args = ("fit", *SMALL, "--data.path", home / "text.txt", *options, "--run_dir", home / name)
        assert main([str(arg) for arg in args]) == 0
    return home


@pytest.fixture
def fit(home: Path, tmp_path: Path, minigpt):
    def call(name: str, *options: object):
        return minigpt("fit", *SMALL, "--data.path", home / "text.txt", *options, "--run_dir", tmp_path / name)

    return call


def both(home: Path) -> str:
    return f"[{home / 'one'}, {home / 'two' / 'best.ckpt'}]"


def test_the_loss_is_the_mix_of_both_cross_entropies(home: Path) -> None:
    """Computed again here token by token; the teachers get no gradient, and have no dropout."""
    saved = read_checkpoint(home / "short" / "best.ckpt")
    student = from_checkpoint(saved)
    distillation = Distillation([home / "one", home / "two" / "best.ckpt"], WEIGHT)
    distillation.load(student, None)
    student.minimised_loss = distillation.loss
    ids = torch.randint(saved["vocab_size"], (3, 9), generator=torch.Generator().manual_seed(1))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    mixed = student.training_step((inputs, targets), 0)

    teachers = [from_checkpoint(read_checkpoint(home / name / "best.ckpt")).net for name in ("one", "two")]
    first, second, log_probabilities = (net(inputs)[0].softmax(-1) for net in (*teachers, student.net))
    log_probabilities = log_probabilities.log()
    expected = torch.zeros(())
    for row in range(3):
        for position in range(8):
            learned = log_probabilities[row, position]
            of_teachers = -((first[row, position] + second[row, position]) / 2 * learned).sum()
            expected += (1 - WEIGHT) * -learned[targets[row, position]] + WEIGHT * of_teachers
    torch.testing.assert_close(mixed, expected / targets.numel())
    mixed.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for net in distillation.nets for parameter in net.parameters())


def test_training_minimises_the_mix_and_logs_the_loss_on_the_text(fit, home: Path, tmp_path: Path) -> None:
    often = ("--trainer.log_every_n_steps", 1)
    assert fit("plain", *often).status == 0
    assert fit("student", *often, "--teachers", both(home)).status == 0
    plain, student = (rows_of(tmp_path / name) for name in ("plain", "student"))
    assert plain[0]["train/loss"] == student[0]["train/loss"], "the first weights are the same, and so is the text"
    assert plain[0]["train/grad_norm"] != student[0]["train/grad_norm"]
    checkpoints = [read_checkpoint(tmp_path / name / "last.ckpt") for name in ("plain", "student")]
    assert checkpoints[0]["state_dict"].keys() == checkpoints[1]["state_dict"].keys(), "teachers are in no checkpoint"
    config = summary(tmp_path / "student")["config"]
    assert (config["teachers"], config["teacher_weight"]) == ([str(home / "one"), str(home / "two" / "best.ckpt")], 0.5)


def test_a_stopped_run_resumes_bit_exact(fit, home: Path, minigpt, tmp_path: Path) -> None:
    options = ("--teachers", both(home), "--ema_decay", 0.6)
    assert fit("straight", *options).status == 0
    with at_micro_batch(7, interrupt):
        assert fit("stopped", *options).status == 130
    assert minigpt("fit", "--run_dir", tmp_path / "stopped", "--ckpt_path", "last").status == 0
    assert differences(tmp_path / "straight", tmp_path / "stopped") == []


def test_only_training_needs_the_teachers(fit, home: Path, minigpt, tmp_path: Path) -> None:
    shutil.copytree(home / "one", teacher := tmp_path / "teacher")
    assert fit("student", "--teachers", teacher).status == 0
    shutil.rmtree(teacher)
    run = ("--run_dir", tmp_path / "student")
    assert minigpt("validate", *run, "--ckpt_path", "best").status == 0
    resume = ("fit", *run, "--ckpt_path", "last", "--trainer.max_steps", 20)
    outcome = minigpt(*resume)
    assert outcome.status == 2
    assert outcome.err.startswith(f"error: the teacher {teacher} cannot be used: the file does not exist; ")
    outcome = minigpt(*resume, "--teachers", home / "one")
    assert (outcome.status, outcome.err.splitlines()[0]) == (0, f"teachers: {teacher} -> {home / 'one'}")
    assert minigpt(*resume[:-1], 24, "--teachers", "").status == 0


@pytest.mark.parametrize(
    ("teacher", "problem"),
    [
        ("none", "the file does not exist; name a checkpoint that minigpt wrote"),
        (
            "other",
            "its vocabulary is not that of this run; train it on the same text, with the same tokenizer",
        ),
        ("short", "it reads 8 tokens of context, fewer than model.block_size 16; train it with --model.block_size 16"),
    ],
)
def test_a_teacher_that_cannot_be_used(fit, home: Path, tmp_path: Path, teacher: str, problem: str) -> None:
    outcome = fit("student", "--teachers", f"[{home / 'one'}, {home / teacher}]")
    assert (outcome.status, outcome.err) == (2, f"error: the teacher {home / teacher} cannot be used: {problem}\n")
    assert not (tmp_path / "student").exists()


def test_it_is_a_callback_of_any_trainer(home: Path, tmp_path: Path) -> None:
    """It takes itself away after the fit, so that another fit learns from the text alone."""

    def trained(*callbacks: Callback) -> ModernLM:
        torch.manual_seed(3)
        data = TextDataModule(path=str(home / "text.txt"), block_size=16, batch_size=4, eval_every=5, seed=1)
        sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "dropout": 0.0}
        model = ModernLM(vocab_size=data.vocab_size, **sizes, lr=1e-3, weight_decay=0.1)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        trainer = Trainer(max_steps=2, accelerator="cpu", callbacks=[*callbacks], default_root_dir=tmp_path, **quiet)
        trainer.fit(model, data)
        return model

    plain, student = trained(), trained(Distillation([home / "one"], 1.0))
    assert not torch.equal(plain.net.head.weight, student.net.head.weight)
    assert student.minimised_loss is None
