"""Settings: which source wins, what a class keeps, what has no effect; and what predict and validate promise.

What the shipped files say is in test_configs, what a mistake is told in test_bad_input, what help shows in test_help.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import yaml
from conftest import PROJECT, TINY, Outcome

from minigpt_pl.cli.options import config_diff, flatten, option_name, option_specs

MiniGPT = Callable[..., Outcome]

SMALL = (*TINY, "--model.n_layer", 1, "--model.n_embd", 8, "--model.block_size", 16, "--trainer.max_steps", 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a small run will lie, with a text beside it."""
    place = tmp_path_factory.mktemp("cli")
    text = "".join(f"line {i}: the sea comes in, the sea goes out.\n" for i in range(80))
    (place / "text.txt").write_text(f"{text}--all of it\n", "utf-8")
    return place / "run"


@pytest.fixture
def trained(run: Path, minigpt: MiniGPT) -> Path:
    """The run, with settings that neither the code nor default.yaml has."""
    if not run.exists():
        words = ("--data.path", run.parent / "text.txt", "--model.lr", 0.005, "--early_stopping.patience", 77)
        assert minigpt("fit", *SMALL, *words, "--data.eval_every", 1, "--run_dir", run).status == 0
    return run


def resolved(minigpt: MiniGPT, *words: object) -> dict[str, Any]:
    """What a command line comes to, by dotted names, as --print_config shows it."""
    done = minigpt(*words, "--print_config")
    assert done.status == 0, done.err
    return {option_name(name): value for name, value in flatten(yaml.safe_load(done.out))}


# Which source wins.


def test_files_and_flags_win_in_their_order(minigpt: MiniGPT, trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: {init_args: {lr: 0.04, n_layer: 6}}\nearly_stopping: {patience: 9}\n")
    last, patience = ("--run_dir", trained, "--ckpt_path", "last"), "early_stopping.patience"
    default = yaml.safe_load((PROJECT / "configs" / "default.yaml").read_text("utf-8"))

    def lr_and_patience(*words: object) -> tuple[float, int]:
        found = resolved(minigpt, "fit", *words)
        return found["model.lr"], found[patience]

    assert lr_and_patience() == (default["model"]["init_args"]["lr"], default["early_stopping"]["patience"])
    assert lr_and_patience(*last) == (0.005, 77)
    assert lr_and_patience(*last, "-c", file) == (0.04, 9)
    assert lr_and_patience(*last, "-c", file, "--model.lr", 0.3) == (0.3, 9)
    assert lr_and_patience("--model.lr", 0.3, "-c", file, *last) == (0.04, 9)
    assert lr_and_patience("-c", file, "--model.lr", 0.3, "-c", file) == (0.04, 9)
    assert resolved(minigpt, "fit")["model.n_layer"] == 4  # the code's own
    assert resolved(minigpt, "fit", "-c", file)["model.n_layer"] == 6


def test_every_setting_can_be_given_and_takes_its_value(minigpt: MiniGPT) -> None:
    """All of them in one line: none shares a value with another, none is lost."""
    before, words, expected = resolved(minigpt, "fit"), [], {}
    elsewhere = ("config", "run_dir", "ckpt_path", "print_config", "model", "trainer.callbacks", "trainer.plugins")
    for name, setting in option_specs("fit").items():
        if name in elsewhere or setting.only not in ("", "ModernLM"):
            continue
        expected[name] = other_value(setting.type, before[name], len(expected))
        words += [f"--{name}", yaml.safe_dump(expected[name], default_flow_style=True).removesuffix("...\n").strip()]
    assert len(expected) > 50
    after = resolved(minigpt, "fit", *words)
    assert {name: after[name] for name in expected} == expected
    assert all(expected[name] != before[name] for name in expected)
    links = ("data.block_size", "data.seed")
    assert {name for name in after if after[name] != before.get(name)} <= {*expected, *links}


def other_value(hint: Any, value: Any, number: int) -> Any:
    """A value of a type that is not this one, another for each number."""
    members = [member for member in get_args(hint) or (hint,) if member is not type(None)]
    if get_origin(hint) is Literal:
        return next(choice for choice in members if choice != value)
    if bool in members:
        return not value
    if any(get_origin(member) is Literal for member in members):
        return "64-true"
    if str in members:
        return f"word{number}"
    if int in members or float in members:
        return 1000 + number if int in members else 1000.25 + number
    return ["a"]


def test_short_and_long_names_of_a_models_settings_mean_the_same(minigpt: MiniGPT) -> None:
    short = resolved(
        minigpt, "fit", "--model.n_layer", 7, "--model.dropout", 0.25, "--model.moe_gate", "softmax_selected"
    )
    long = resolved(
        minigpt, "fit", "--model.init_args.n_layer", 7, "--model.init_args.dropout", 0.25,
        "--model.init_args.moe_gate", "softmax_selected",
    )  # fmt: skip
    assert short == long
    assert (short["model.n_layer"], short["model.dropout"], short["model.moe_gate"]) == (7, 0.25, "softmax_selected")


def test_another_class_keeps_the_settings_that_both_have(minigpt: MiniGPT) -> None:
    words = ("--model.n_layer", 7, "--model.dropout", 0.25)
    for line in (
        (*words, "--model", "ClassicLM"),
        ("--model", "ClassicLM", *words),
        ("-c", "moe", "-c", "classic", *words),
    ):
        found = resolved(minigpt, "fit", *line)
        assert (found["model.n_layer"], found["model.dropout"]) == (7, 0.25)
        assert "model.n_experts" not in found
        assert found["model"] == "minigpt_pl.ClassicLM"


def test_a_shipped_file_is_found_from_anywhere_and_a_file_here_comes_first(
    minigpt: MiniGPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = resolved(minigpt, "fit", "-c", "journey/p2_refine")
    assert shipped["model.block_size"] == 128
    for words in (("-c", "journey/p2_refine.yaml"), ("--config", "journey/p2_refine"), ("-cjourney/p2_refine",)):
        assert resolved(minigpt, "fit", *words) == shipped
    (tmp_path / "smoke").write_text("model: {init_args: {n_layer: 9}}\n")
    assert resolved(minigpt, "fit", "-c", "smoke")["model.n_layer"] == 9
    (tmp_path / "model.yaml").write_text("class_path: ClassicLM\ninit_args: {n_layer: 5}\n")
    assert resolved(minigpt, "fit", "--model", "model.yaml")["model.n_layer"] == 5


def test_config_yaml_repeats_a_run_and_does_not_go_on_with_it(minigpt: MiniGPT, trained: Path, tmp_path: Path) -> None:
    done = minigpt("fit", "-c", trained / "config.yaml", "--run_dir", tmp_path / "again")
    assert done.status == 0, done.err
    assert (tmp_path / "again" / "config.yaml").read_bytes() == (trained / "config.yaml").read_bytes()
    weights = [torch.load(place / "last.ckpt")["state_dict"] for place in (trained, tmp_path / "again")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not {"run_dir", "ckpt_path"} & yaml.safe_load((trained / "config.yaml").read_text("utf-8")).keys()


def test_printed_settings_are_a_file_of_settings(minigpt: MiniGPT, tmp_path: Path) -> None:
    words = ("-c", "moe", "--data.tokenizer", "bpe", "--wandb.tags", "[a, b]", "--samples", "null")
    printed = minigpt("fit", *words, "--print_config").out
    (tmp_path / "printed.yaml").write_text(printed, "utf-8")
    assert resolved(minigpt, "fit", "-c", tmp_path / "printed.yaml") == resolved(minigpt, "fit", *words)


def test_a_checkpoint_gives_validate_its_model_and_data_and_nothing_of_the_run(minigpt: MiniGPT, trained: Path) -> None:
    stored = {
        option_name(name): value
        for name, value in flatten(yaml.safe_load((trained / "config.yaml").read_text("utf-8")))
    }
    found = resolved(minigpt, "validate", "--ckpt_path", trained / "best.ckpt", "--data.batch_size", 3)
    for name, value in stored.items():
        if name.startswith(("model", "data.")):
            assert found[name] == (3 if name == "data.batch_size" else value)
    assert not [name for name in found if name.startswith(("early_stopping", "last", "samples", "wandb"))]


# What changes and what is idle is said.


def test_what_changes_under_a_checkpoint_is_said_in_one_line_each(
    minigpt: MiniGPT, trained: Path, tmp_path: Path
) -> None:
    words = ("--trainer.max_steps", 3, "--model.lr", 0.001, "--data.eval_every", 2)
    done = minigpt("fit", "--ckpt_path", trained / "last.ckpt", "--run_dir", tmp_path / "branch", *words)
    assert done.status == 0
    assert set(done.err.splitlines()) == {
        "trainer.max_steps: 2 -> 3",
        "model.lr: 0.005 -> 0.001",
        "data.eval_every: 1 -> 2",
    }


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--model.moe_top_k", 2), "--model.moe_top_k 2 has no effect: model.n_experts is 0"),
        (
            ("--model.optimizer", "adamw", "--model.muon_lr", 0.1),
            "--model.muon_lr 0.1 has no effect: model.optimizer is adamw",
        ),
        (("--data.bpe_vocab_size", 99), "--data.bpe_vocab_size 99 has no effect: data.tokenizer is char"),
        (("--data.eval_iters", 5), "--data.eval_iters 5 has no effect: data.eval_mode is full"),
        (
            ("--data.eval_mode", "sampled", "--data.eval_iters", 1, "--data.max_eval_tokens", 64),
            "--data.max_eval_tokens 64 has no effect: data.eval_mode is sampled",
        ),
        (
            ("--model.n_experts", 2, "--model.moe_gate", "softmax_selected"),
            "model.moe_gate softmax_selected: with model.moe_top_k 1 the router learns from the aux loss alone",
        ),
    ],
)
def test_a_setting_without_effect_is_said(
    minigpt: MiniGPT, run: Path, tmp_path: Path, words: tuple[Any, ...], line: str
) -> None:
    place = ("--data.path", run.parent / "text.txt", "--run_dir", tmp_path / "r")
    done = minigpt("fit", *SMALL, "--trainer.max_steps", 1, *words, *place)
    assert (done.status, done.err) == (0, f"{line}\n")


def test_options_of_training_do_nothing_in_validate_and_are_said(minigpt: MiniGPT, trained: Path) -> None:
    best = ("--ckpt_path", trained / "best.ckpt")
    done = minigpt("validate", *best, "--model.lr", 5)
    assert (done.status, done.err) == (0, "--model.lr 5 has no effect: validate does not train\n")
    assert done.out == minigpt("validate", *best).out
    done = minigpt("predict", *best, "--data.batch_size", 5, "--sample.max_new_tokens", 1)
    assert (done.status, done.err) == (0, "--data.batch_size 5 has no effect: predict reads no text\n")
    done = minigpt("predict", *best, "--trainer.precision", "bf16-mixed", "--sample.max_new_tokens", 1)
    assert (done.status, done.err) == (0, "--trainer.precision bf16-mixed has no effect: predict computes in fp32\n")


def test_a_text_that_is_named_is_read_though_the_checkpoint_has_one_of_that_name(
    minigpt: MiniGPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ("--data.path", "text.txt")
    for place, line in (("here", "the sea comes in.\n"), ("there", "it is a sheet.\n")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "text.txt").write_text(line * 80)
    monkeypatch.chdir(tmp_path / "here")
    assert minigpt("fit", *SMALL, *said, "--run_dir", "r").status == 0
    best = ("validate", "--ckpt_path", tmp_path / "here" / "r" / "best.ckpt")
    monkeypatch.chdir(tmp_path / "there")
    remembered = minigpt(*best)
    assert remembered.status == 0
    other = minigpt(*best, *said)
    assert other.status == 2
    assert "is not the text" in other.err or "changed" in other.err
    forced = minigpt(*best, *said, "--data.allow_data_change", "true")
    assert forced.status == 0
    assert forced.out != remembered.out


def test_a_setting_that_an_older_checkpoint_does_not_know_is_told_only_if_it_changes_something() -> None:
    assert list(config_diff({"data": {}}, {"data": {"order": "random"}})) == []
    assert list(config_diff({"data": {}}, {"data": {"order": "epoch"}})) == [("data.sampling", None, "epoch")]
    assert list(config_diff({"data": {"order": None}}, {"data": {"order": "random"}}))


# predict and validate.


@pytest.fixture
def predict(minigpt: MiniGPT, trained: Path) -> Callable[..., Outcome]:
    return lambda *words: minigpt("predict", "--ckpt_path", trained / "best.ckpt", "--sample.max_new_tokens", 6, *words)


def test_predict_writes_the_prompt_its_continuation_and_a_newline(predict: Callable[..., Outcome]) -> None:
    for prompt in ("the sea", "null", "123", "[1]", "a: 1", "--all", " ", "-"):
        known = "".join(c for c in prompt if c in "the seanul123:- ")
        done = predict(f"--sample.prompt={known}")
        assert (done.status, done.err) == (0, "")
        assert done.out.startswith(known)
        assert done.out.endswith("\n")
        assert len(done.out) == len(known) + 6 + 1
    again = predict("--sample.prompt=-")
    assert again.out == done.out
    assert predict("--sample.prompt=-", "--sample.seed", 2).out != done.out


def test_predict_takes_one_device_whatever_is_said(predict: Callable[..., Outcome]) -> None:
    alone = predict("--sample.prompt", "the")
    several = predict("--sample.prompt", "the", "--trainer.accelerator", "cpu", "--trainer.devices", 2)
    assert (several.status, several.out) == (0, alone.out)
    assert "--trainer.devices 2 has no effect: predict takes one device" in several.err


def test_an_empty_prompt_is_a_newline(predict: Callable[..., Outcome]) -> None:
    assert predict().out == predict("--sample.prompt", "").out == predict("--sample.prompt", "\n").out
    assert predict().out[0] == "\n"


def test_results_come_in_order_of_prompts_and_samples_with_lines_between(
    predict: Callable[..., Outcome], tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffthe sea\r\nin, out\r\nline 1".encode())
    words = ("--sample.prompt_file", file, "--sample.num_samples", 2, "--sample.temperature", 1.5)
    done = predict(*words)
    results = done.out.removesuffix("\n").split("\n---\n")
    assert [next(p for p in ("the sea", "in, out", "line 1") if r.startswith(p)) for r in results] == [
        "the sea", "the sea", "in, out", "in, out", "line 1", "line 1",
    ]  # fmt: skip
    assert results[0] != results[1]
    alone = predict(
        "--sample.prompt", "in, out", "--sample.temperature", 1.5
    )  # depends on its own prompt and number only
    assert alone.out == f"{results[2]}\n"


def test_a_prompt_longer_than_the_window_is_continued_from_its_end_and_said(predict: Callable[..., Outcome]) -> None:
    prompt = "the sea goes out, " * 3
    done = predict("--sample.prompt", prompt)
    assert done.status == 0
    assert done.err == f"prompt 1 has {len(prompt)} tokens: the model reads its last 16\n"
    assert done.out.startswith(prompt)
    assert len(done.out) == len(prompt) + 6 + 1


def test_a_process_writes_the_text_and_nothing_else_and_survives_a_reader_that_has_seen_enough(
    minigpt: MiniGPT, trained: Path
) -> None:
    words = ["--ckpt_path", trained / "best.ckpt", "--sample.prompt", "the sea", "--sample.max_new_tokens", 400]
    expected = minigpt("predict", *words).out
    command = [sys.executable, "-m", "minigpt_pl", "predict", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=PROJECT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        seen = process.stdout.read(100)
        process.stdout.close()  # as `| head -c 100` does
        assert seen.decode() == expected[:100]
        assert (process.stderr.read(), process.wait()) == (b"", 0)


def test_validate_measures_anew(minigpt: MiniGPT, trained: Path, tmp_path: Path) -> None:
    """best_val again from a file from which all that was measured has been taken."""
    best = torch.load(trained / "best.ckpt")
    score = best["callbacks"]["RunSummary"]["best"]["best_val"]
    torch.save({**best, "callbacks": {}, "loops": {}}, tmp_path / "bare.ckpt")
    done = minigpt("validate", "--ckpt_path", tmp_path / "bare.ckpt", "--data.batch_size", 5)
    assert done.status == 0, done.err
    figures = dict(line.split() for line in done.out.splitlines())
    assert float(figures["val/loss"]) == pytest.approx(score, abs=1e-6)
