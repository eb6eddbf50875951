"""What is stored of a run: token losses, and a configuration without directories of the machine that it ran on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.runs import rows_of, summary, train_small

from minigpt_pl.experiments.results import (
    Result,
    TokenNLL,
    add_result,
    load_best,
    measure,
    read_results,
    read_token_nll,
    run_differences,
    strip_paths,
)
from minigpt_pl.experiments.spec import resolve_config
from minigpt_pl.models.gpt import token_cross_entropy


def test_loss_by_position_and_by_character_are_of_the_right_tokens() -> None:
    """Two windows of three targets, of one to three characters; the first token of the split is not scored."""
    sums = np.float32([2, 4, 6, 8, 12])  # over two seeds
    nll = TokenNLL(sums, np.array([0, 1]), np.array([1, 2, 3, 1, 1]), np.int32([2, 8]), window=3)
    values = nll.by_character()
    assert np.isnan(values[:2]).all()
    assert values[2:].tolist() == [1, 1, 1, 1, 1, 1, 4, 6]
    assert nll.by_position().tolist() == [5 / 2, 8 / 3, 1]


def test_an_evaluation_on_random_windows_varies_as_the_report_says() -> None:
    draw, one = np.random.default_rng(3), np.array([0])
    lengths = draw.integers(1, 4, 50 * 7 + 3)  # tokens; the last window is a short one
    losses = (lengths * draw.gamma(2, 1, len(lengths))).astype(np.float32)
    nll = TokenNLL(losses, one, lengths, np.zeros(51, np.int32), 7)
    nats, characters = (x[:350].reshape(50, 7).sum(1) for x in (losses.astype(float), lengths))
    evaluations = [np.mean((nats / characters)[draw.integers(0, 50, 12)]) for _ in range(20_000)]
    sd = nll.window_sd()
    assert sd is not None
    assert sd / 12**0.5 == pytest.approx(np.std(evaluations), rel=0.03)
    single = TokenNLL(np.ones(7, np.float32), one, np.ones(7), np.zeros(1, np.int32), 7)
    assert single.window_sd() is None


def test_a_new_option_does_not_make_old_results_another_run() -> None:
    before = resolve_config([])
    del before["model"]["init_args"]["lr_schedule"]
    now = resolve_config(["--wandb.group", "x", "--data.path", "README.md"])
    assert list(run_differences(before, now)) == []
    assert list(run_differences(before, resolve_config(["--model.lr_schedule", "constant"]))) == [
        "model.lr_schedule: None -> constant"
    ]


def test_older_results_are_of_the_model_as_it_then_was() -> None:
    before = resolve_config([])
    for name in ("qk_norm", "attention_every"):
        del before["model"]["init_args"][name]
    same = ["--model.qk_norm", "false", "--model.attention_every", "1"]
    assert list(run_differences(before, resolve_config(same))) == []
    assert list(run_differences(before, resolve_config([]))) == [
        "model.qk_norm: False -> True",
        "model.attention_every: 1 -> 4",
    ]
    assert "qk_norm" not in before["model"]["init_args"], "results stay as they are"


def test_losses_on_splits_by_other_tokens_are_not_compared() -> None:
    def protocols(*args: str, tokenizer: str = "t", older: bool = False) -> tuple[object, object]:
        config = resolve_config(list(args))
        if older:
            del config["data"]["split_unit"]
        summary = {"data_sha256": "d", "tokenizer_sha256": tokenizer}
        result = Result("a", 0, "", "", config, summary, "", [])
        return result.eval_protocol(), result.batch_protocol()

    bpe, tokens = ("--data.tokenizer", "bpe"), ("--data.split_unit", "tokens")
    assert protocols(older=True) == protocols() == protocols(*tokens), "a token is a character"
    assert protocols(*bpe, older=True) == protocols(*bpe)
    assert protocols(*bpe)[0] == protocols()[0]
    for one, other in zip(protocols(*bpe), protocols(*bpe, *tokens), strict=True):
        assert one != other
    assert protocols(*bpe, *tokens)[0] != protocols(*bpe, *tokens, tokenizer="u")[0], "tokens end at other characters"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fit --data.path=data/input.txt -c x/y", "fit --data.path=data/input.txt -c x/y"),
        ("fit --data.path=/home/me/my.txt -c x/y", "fit --data.path=my.txt -c x/y"),
        ('{"path": "/home/me/my.txt", "ratio": "1/2"}', '{"path": "my.txt", "ratio": "1/2"}'),
    ],
)
def test_results_name_no_directories_of_this_machine(text: str, expected: str) -> None:
    assert strip_paths(text) == expected


def test_a_run_with_both_estimators_keeps_both(tmp_path: Path) -> None:
    run = train_small(tmp_path, "--data.eval_mode", "both", "--data.eval_iters", 1)
    result, nll = measure(run, "a", 1337, "", "")
    add_result(tmp_path / "out", result, nll)
    (stored,) = read_results(tmp_path / "out")
    assert stored.summary | {"config": 0} == summary(run) | {
        "config": 0, "window_sd": nll.window_sd(), "flops_per_token": stored.summary["flops_per_token"],
        "expected_estimate": stored.summary["expected_estimate"],
    }  # fmt: skip
    assert nll.mean.mean() == pytest.approx(stored.summary["full_val_at_best"], rel=1e-5)
    losses = [float(row["val/full_loss"]) for row in rows_of(run) if row["split"] == "val"]
    assert stored.metrics("val")["val/full_loss"] == pytest.approx(losses, rel=1e-5)
    assert stored.summary["best_full_val"] == min(losses)


def test_the_expected_estimate_is_the_mean_over_every_window(tmp_path: Path) -> None:
    run = train_small(tmp_path, "--data.eval_mode", "sampled", "--data.eval_iters", 1)
    net, data = load_best(run)
    expected = measure(run, "a", 1337, "", "")[0].summary["expected_estimate"]
    text, T = torch.from_numpy(data.tokens("val").astype("int64")), data.config.block_size
    with torch.inference_mode():
        windows = text.unfold(0, T + 1, 1)
        by_window = token_cross_entropy(net(windows[:, :-1])[0], windows[:, 1:]).mean(1)
    assert expected == pytest.approx(by_window.mean().item(), rel=1e-5)


def test_stored_losses_of_tokens_are_exact_sums_of_rounded_ones(tmp_path: Path) -> None:
    losses = np.random.default_rng(1).gamma(2, 1, (2, 500)).astype(np.float32)
    for seed, nats in enumerate(losses):
        nll = TokenNLL(nats, np.array([seed]), np.ones(500, np.uint8), np.zeros(4, np.int32), 128)
        add_result(tmp_path, Result("a", seed, "", "", {}, {}, "", []), nll)
    stored = read_token_nll(tmp_path)["a"].total.astype(float)
    assert np.array_equal(stored, sum(np.round(nats.astype(float) * 1024) / 1024 for nats in losses))
    assert stored == pytest.approx(losses.sum(0), abs=1 / 1024)


def test_losses_compare_if_the_same_estimator_has_chosen_them() -> None:
    def protocol(*args: str) -> tuple[object, ...]:
        config = resolve_config([f"--data.{arg}" for arg in args])
        return Result("a", 0, "", "", config, {"data_sha256": "d", "tokenizer_sha256": "t"}, "", []).eval_protocol()

    assert protocol("eval_mode=both") == protocol("eval_mode=sampled") != protocol("eval_mode=full")
    assert protocol("eval_mode=both") == protocol("eval_mode=both", "max_eval_tokens=64")
    assert protocol("eval_mode=full") != protocol("eval_mode=full", "max_eval_tokens=64")
    assert protocol("eval_mode=both") != protocol("eval_mode=both", "train_frac=0.8")
