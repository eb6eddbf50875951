"""Options: which source wins, which ones a class keeps, which have no effect; and what predict and validate print.

The shipped configs are tested in test_configs, mistakes in test_bad_input, --help in test_help.
"""

import json
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
    """The directory of a small run, with a text beside it."""
    directory = tmp_path_factory.mktemp("cli")
    text = "".join(f"line {i}: the sea comes in, the sea goes out.\n" for i in range(80))
    (directory / "text.txt").write_text(f"{text}--all of it\n", "utf-8")
    return directory / "run"


@pytest.fixture
def trained(run: Path, minigpt: MiniGPT) -> Path:
    """The run, with options that differ from the code and from default.yaml."""
    if not run.exists():
        args = ("--data.path", run.parent / "text.txt", "--model.lr", 0.005, "--early_stopping.patience", 77)
        assert minigpt("fit", *SMALL, *args, "--data.eval_every", 1, "--run_dir", run).status == 0
    return run


def resolved(minigpt: MiniGPT, *args: object) -> dict[str, Any]:
    """The resolved configuration by dotted names, from --print_config."""
    outcome = minigpt(*args, "--print_config")
    assert outcome.status == 0, outcome.err
    return {option_name(name): value for name, value in flatten(yaml.safe_load(outcome.out))}


# Which source wins.


def test_files_and_flags_win_in_their_order(minigpt: MiniGPT, trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: {init_args: {lr: 0.04, n_layer: 6}}\nearly_stopping: {patience: 9}\n")
    last, patience = ("--run_dir", trained, "--ckpt_path", "last"), "early_stopping.patience"
    default = yaml.safe_load((PROJECT / "configs" / "default.yaml").read_text("utf-8"))

    def lr_and_patience(*args: object) -> tuple[float, int]:
        config = resolved(minigpt, "fit", *args)
        return config["model.lr"], config[patience]

    assert lr_and_patience() == (default["model"]["init_args"]["lr"], default["early_stopping"]["patience"])
    assert lr_and_patience(*last) == (0.005, 77)
    assert lr_and_patience(*last, "-c", file) == (0.04, 9)
    assert lr_and_patience(*last, "-c", file, "--model.lr", 0.3) == (0.3, 9)
    assert lr_and_patience("--model.lr", 0.3, "-c", file, *last) == (0.04, 9)
    assert lr_and_patience("-c", file, "--model.lr", 0.3, "-c", file) == (0.04, 9)
    assert resolved(minigpt, "fit")["model.n_layer"] == 4  # the default in the code
    assert resolved(minigpt, "fit", "-c", file)["model.n_layer"] == 6


def test_every_option_can_be_set(minigpt: MiniGPT) -> None:
    """All of them on one command line: none shares its value with another, and none is lost."""
    before, args, expected = resolved(minigpt, "fit"), [], {}
    special = (
        "config",
        "run_dir",
        "ckpt_path",
        "init_from",
        "print_config",
        "model",
        "trainer.callbacks",
        "trainer.plugins",
    )
    for name, spec in option_specs("fit").items():
        if name in special or spec.only not in ("", "ModernLM"):
            continue
        expected[name] = other_value(spec.type, before[name], len(expected))
        args += [f"--{name}", yaml.safe_dump(expected[name], default_flow_style=True).removesuffix("...\n").strip()]
    assert len(expected) > 50
    after = resolved(minigpt, "fit", *args)
    assert {name: after[name] for name in expected} == expected
    assert all(expected[name] != before[name] for name in expected)
    linked = ("data.block_size", "data.seed")
    assert {name for name in after if after[name] != before.get(name)} <= {*expected, *linked}


def other_value(hint: Any, value: Any, number: int) -> Any:
    """A value of a type that differs from `value`, and between two numbers."""
    members = [member for member in get_args(hint) or (hint,) if member is not type(None)]
    if get_origin(hint) is Literal:
        return next(choice for choice in members if choice != value)
    if bool in members:
        return not value
    if any(get_origin(member) is Literal for member in members):
        return "64-true"
    if str in members:
        return f"word{number}"
    bases = [getattr(member, "_type", member) for member in members]  # int or float of a restricted number type
    if getattr(members[0], "_expression", "").endswith(("<1", "<=1")):
        return round(0.3 + number / 1000, 4)
    if int in bases or float in bases:
        return 1000 + number if int in bases else 1000.25 + number
    return ["a"]


def test_short_and_long_names_of_a_models_options_mean_the_same(minigpt: MiniGPT) -> None:
    short = resolved(
        minigpt, "fit", "--model.n_layer", 7, "--model.dropout", 0.25, "--model.moe_gate", "softmax_selected"
    )
    long = resolved(
        minigpt, "fit", "--model.init_args.n_layer", 7, "--model.init_args.dropout", 0.25,
        "--model.init_args.moe_gate", "softmax_selected",
    )  # fmt: skip
    assert short == long
    assert (short["model.n_layer"], short["model.dropout"], short["model.moe_gate"]) == (7, 0.25, "softmax_selected")


def test_another_class_keeps_the_options_that_both_have(minigpt: MiniGPT) -> None:
    args = ("--model.n_layer", 7, "--model.dropout", 0.25)
    for line in (
        (*args, "--model", "ClassicLM"),
        ("--model", "ClassicLM", *args),
        ("-c", "moe", "-c", "classic", *args),
    ):
        config = resolved(minigpt, "fit", *line)
        assert (config["model.n_layer"], config["model.dropout"]) == (7, 0.25)
        assert "model.n_experts" not in config
        assert config["model"] == "minigpt_pl.ClassicLM"


def test_a_shipped_file_is_found_from_any_directory_and_a_local_file_comes_first(
    minigpt: MiniGPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = resolved(minigpt, "fit", "-c", "journey/p2_refine")
    assert shipped["model.block_size"] == 128
    for args in (("-c", "journey/p2_refine.yaml"), ("--config", "journey/p2_refine"), ("-cjourney/p2_refine",)):
        assert resolved(minigpt, "fit", *args) == shipped
    (tmp_path / "smoke").write_text("model: {init_args: {n_layer: 9}}\n")
    assert resolved(minigpt, "fit", "-c", "smoke")["model.n_layer"] == 9
    (tmp_path / "model.yaml").write_text("class_path: ClassicLM\ninit_args: {n_layer: 5}\n")
    assert resolved(minigpt, "fit", "--model", "model.yaml")["model.n_layer"] == 5


def test_config_yaml_repeats_a_run_and_does_not_resume_it(minigpt: MiniGPT, trained: Path, tmp_path: Path) -> None:
    outcome = minigpt("fit", "-c", trained / "config.yaml", "--run_dir", tmp_path / "again")
    assert outcome.status == 0, outcome.err
    assert (tmp_path / "again" / "config.yaml").read_bytes() == (trained / "config.yaml").read_bytes()
    weights = [torch.load(run_dir / "last.ckpt")["state_dict"] for run_dir in (trained, tmp_path / "again")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not {"run_dir", "ckpt_path"} & yaml.safe_load((trained / "config.yaml").read_text("utf-8")).keys()


def test_a_printed_configuration_is_a_configuration_file(minigpt: MiniGPT, tmp_path: Path) -> None:
    args = ("-c", "moe", "--data.tokenizer", "bpe", "--wandb.tags", "[a, b]", "--samples", "null")
    printed = minigpt("fit", *args, "--print_config").out
    (tmp_path / "printed.yaml").write_text(printed, "utf-8")
    assert resolved(minigpt, "fit", "-c", tmp_path / "printed.yaml") == resolved(minigpt, "fit", *args)


def test_validate_takes_model_and_data_from_the_checkpoint_and_nothing_else(minigpt: MiniGPT, trained: Path) -> None:
    stored = dict(flatten(yaml.safe_load((trained / "config.yaml").read_text("utf-8"))))
    config = resolved(minigpt, "validate", "--ckpt_path", trained / "best.ckpt", "--data.batch_size", 3)
    for name, value in ((option_name(name), value) for name, value in stored.items()):
        if name.startswith(("model", "data.")):
            assert config[name] == (3 if name == "data.batch_size" else value)
    assert not [name for name in config if name.startswith(("early_stopping", "checkpoint", "samples", "wandb"))]


# Changes and options without effect are reported.


def test_each_change_under_a_checkpoint_is_one_line(minigpt: MiniGPT, trained: Path, tmp_path: Path) -> None:
    args = ("--trainer.max_steps", 3, "--model.lr", 0.001, "--data.eval_every", 2)
    outcome = minigpt("fit", "--ckpt_path", trained / "last.ckpt", "--run_dir", tmp_path / "fork", *args)
    assert outcome.status == 0
    assert set(outcome.err.splitlines()) == {
        "trainer.max_steps: 2 -> 3",
        "model.lr: 0.005 -> 0.001",
        "data.eval_every: 1 -> 2",
    }


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("--model.moe_top_k", 2), "--model.moe_top_k 2 has no effect: model.n_experts is 0"),
        (
            ("--model.optimizer", "adamw", "--model.muon_lr", 0.1),
            "--model.muon_lr 0.1 has no effect: model.optimizer is adamw",
        ),
        (("--data.bpe_vocab_size", 99), "--data.bpe_vocab_size 99 has no effect: data.tokenizer is char"),
        (("--data.bpe_across_lines", "true"), "--data.bpe_across_lines true has no effect: data.tokenizer is char"),
        (("--data.split_unit", "tokens"), "--data.split_unit tokens has no effect: data.tokenizer is char"),
        (("--data.eval_iters", 5), "--data.eval_iters 5 has no effect: data.eval_mode is full"),
        (
            ("--data.eval_mode", "sampled", "--data.eval_iters", 1, "--data.max_eval_tokens", 64),
            "--data.max_eval_tokens 64 has no effect: data.eval_mode is sampled",
        ),
        (
            ("--model.n_experts", 2, "--model.moe_gate", "softmax_selected"),
            "model.moe_gate softmax_selected: with model.moe_top_k 1 the router learns from the balance loss alone",
        ),
    ],
)
def test_an_option_without_effect_is_reported(
    minigpt: MiniGPT, run: Path, tmp_path: Path, args: tuple[Any, ...], line: str
) -> None:
    paths = ("--data.path", run.parent / "text.txt", "--run_dir", tmp_path / "r")
    outcome = minigpt("fit", *SMALL, "--trainer.max_steps", 1, "--model.conv_kernel_size", 0, *args, *paths)
    assert (outcome.status, outcome.err) == (0, f"{line}\n")


def test_training_options_have_no_effect_in_validate(minigpt: MiniGPT, trained: Path) -> None:
    best = ("--ckpt_path", trained / "best.ckpt")
    outcome = minigpt("validate", *best, "--model.lr", 5)
    assert (outcome.status, outcome.err) == (0, "--model.lr 5 has no effect: validate does not train\n")
    assert outcome.out == minigpt("validate", *best).out
    outcome = minigpt("predict", *best, "--data.batch_size", 5, "--sample.max_new_tokens", 1)
    assert (outcome.status, outcome.err) == (0, "--data.batch_size 5 has no effect: predict does not read the text\n")
    outcome = minigpt("predict", *best, "--trainer.precision", "bf16-mixed", "--sample.max_new_tokens", 1)
    assert (outcome.status, outcome.err) == (
        0,
        "--trainer.precision bf16-mixed has no effect: predict always computes in fp32\n",
    )


def test_data_path_wins_over_a_file_of_that_name_in_the_checkpoint(
    minigpt: MiniGPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ("--data.path", "text.txt")
    for directory, line in (("here", "the sea comes in.\n"), ("there", "it is a sheet.\n")):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "text.txt").write_text(line * 80)
    monkeypatch.chdir(tmp_path / "here")
    assert minigpt("fit", *SMALL, *path, "--run_dir", "r").status == 0
    validate = ("validate", "--ckpt_path", tmp_path / "here" / "r" / "best.ckpt")
    monkeypatch.chdir(tmp_path / "there")
    stored = minigpt(*validate)
    assert stored.status == 0
    other = minigpt(*validate, *path)
    assert other.status == 2
    assert "it is not the text that the checkpoint was trained on" in other.err
    accepted = minigpt(*validate, *path, "--data.allow_data_change", "true")
    assert accepted.status == 0
    assert accepted.out != stored.out


def test_an_option_that_an_older_checkpoint_lacks_is_a_change_only_with_another_value_than_its_default() -> None:
    assert list(config_diff({"data": {}}, {"data": {"sampling": "random"}})) == []
    assert list(config_diff({"data": {}}, {"data": {"sampling": "epoch"}})) == [("data.sampling", None, "epoch")]
    assert list(config_diff({"data": {"sampling": None}}, {"data": {"sampling": "random"}}))


# predict and validate.


@pytest.fixture
def predict(minigpt: MiniGPT, trained: Path) -> Callable[..., Outcome]:
    return lambda *args: minigpt("predict", "--ckpt_path", trained / "best.ckpt", "--sample.max_new_tokens", 6, *args)


def test_predict_writes_the_prompt_its_continuation_and_a_newline(predict: Callable[..., Outcome]) -> None:
    for prompt in ("the sea", "null", "123", "[1]", "a: 1", "--all", " ", "-"):
        known = "".join(c for c in prompt if c in "the seanul123:- ")
        outcome = predict(f"--sample.prompt={known}")
        assert (outcome.status, outcome.err) == (0, "")
        assert outcome.out.startswith(known)
        assert outcome.out.endswith("\n")
        assert len(outcome.out) == len(known) + 6 + 1
    again = predict("--sample.prompt=-")
    assert again.out == outcome.out
    assert predict("--sample.prompt=-", "--sample.seed", 2).out != outcome.out


def test_predict_uses_one_device(predict: Callable[..., Outcome]) -> None:
    alone = predict("--sample.prompt", "the")
    several = predict("--sample.prompt", "the", "--trainer.accelerator", "cpu", "--trainer.devices", 2)
    assert (several.status, several.out) == (0, alone.out)
    assert "--trainer.devices 2 has no effect: predict always uses one device" in several.err


def test_an_empty_prompt_is_a_line_break(predict: Callable[..., Outcome]) -> None:
    assert predict().out == predict("--sample.prompt", "").out == predict("--sample.prompt", "\n").out
    assert predict().out[0] == "\n"


def test_results_come_in_order_of_prompts_and_samples_with_lines_between(
    predict: Callable[..., Outcome], tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffthe sea\r\nin, out\r\nline 1".encode())
    args = ("--sample.prompt_file", file, "--sample.num_samples", 2, "--sample.temperature", 1.5)
    outcome = predict(*args)
    results = outcome.out.removesuffix("\n").split("\n---\n")
    prompts = ("the sea", "in, out", "line 1")
    starts = [next(prompt for prompt in prompts if result.startswith(prompt)) for result in results]
    assert starts == [prompt for prompt in prompts for _ in range(2)]
    assert results[0] != results[1]
    alone = predict("--sample.prompt", "in, out", "--sample.temperature", 1.5)  # depends on its prompt and number only
    assert alone.out == f"{results[2]}\n"


def test_a_prompt_longer_than_the_window_is_continued_from_its_end(predict: Callable[..., Outcome]) -> None:
    prompt = "the sea goes out, " * 3
    outcome = predict("--sample.prompt", prompt)
    assert outcome.status == 0
    assert outcome.err == f"prompt 1 has {len(prompt)} tokens: the model reads the last 16\n"
    assert outcome.out.startswith(prompt)
    assert len(outcome.out) == len(prompt) + 6 + 1


@pytest.mark.e2e
def test_a_process_writes_only_the_text_and_survives_a_closed_pipe(minigpt: MiniGPT, trained: Path) -> None:
    args = ["--ckpt_path", trained / "best.ckpt", "--sample.prompt", "the sea", "--sample.max_new_tokens", 400]
    expected = minigpt("predict", *args).out
    command = [sys.executable, "-m", "minigpt_pl", "predict", *map(str, args)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=PROJECT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        seen = process.stdout.read(100)
        process.stdout.close()  # like `| head -c 100`
        assert seen.decode() == expected[:100]
        assert (process.stderr.read(), process.wait()) == (b"", 0)


def test_validate_measures_and_does_not_copy(minigpt: MiniGPT, trained: Path, tmp_path: Path) -> None:
    """It finds best_val again from a file without any metrics."""
    best = torch.load(trained / "best.ckpt")
    score = json.loads((trained / "summary.json").read_text("utf-8"))["best_val"]
    torch.save({**best, "callbacks": {}, "loops": {}}, tmp_path / "bare.ckpt")
    outcome = minigpt("validate", "--ckpt_path", tmp_path / "bare.ckpt", "--data.batch_size", 5)
    assert outcome.status == 0, outcome.err
    metrics = dict(line.split() for line in outcome.out.splitlines())
    assert float(metrics["val/loss"]) == pytest.approx(score, abs=1e-6)
