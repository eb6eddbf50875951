"""The reference report's runs are fixed: their configurations, and the objects that are built from them.

`PYTHONPATH=tests python tests/cli/test_journey.py` rewrites fixtures/journey.json: do that only if a run is meant to
change.
"""

import json
import sys
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import yaml
from conftest import PROJECT
from lightning.pytorch import Callback, LightningModule, Trainer
from support.configs import CONFIGS, JOURNEY, Built, build, config, resolve, resolved_leaves
from torch import nn

from minigpt_pl.cli import options
from minigpt_pl.cli.app import MiniGPTCLI
from minigpt_pl.cli.options import flatten
from minigpt_pl.data.tokenizer import BPETokenizer, CharTokenizer
from minigpt_pl.models.config import ClassicConfig, ModernConfig
from minigpt_pl.models.dropout import Dropout
from minigpt_pl.models.gpt import ClassicGPT, ModernGPT
from minigpt_pl.runtime.quiet import silence_libraries
from minigpt_pl.training.checkpointing import BestCheckpoint, LastCheckpoint
from minigpt_pl.training.sampling import SampleCallback
from minigpt_pl.training.stopping import GracefulStop, ValLossEarlyStopping

FIXTURE = PROJECT / "tests" / "fixtures" / "journey.json"
SHORT_TEXT = 20_000  # characters for merges across lines: the time to learn them grows with the square


def what_is_learned(resolved: dict[str, Any]) -> dict[str, Any]:
    """The options that decide it. Those of the Trainer that are null are left out: Lightning may add others."""
    trainer = {name: value for name, value in resolved["trainer"].items() if value is not None}
    return {name: resolved[name] for name in resolved if name not in ("checkpoint", "wandb")} | {"trainer": trainer}


def plain(node: Any) -> Any:
    return json.loads(json.dumps(node, default=str))


def learning_rates(run: Built, steps: list[int]) -> list[float]:
    """The learning rate of the update that follows so many steps."""
    schedule: Any = run.model.configure_optimizers()["lr_scheduler"]["scheduler"]
    rates = []
    for step in steps:
        schedule.start(step, run.trainer.max_steps)
        rates.append(schedule.optimizer.param_groups[0]["lr"])
    return rates


def describe(run: Built) -> dict[str, Any]:
    """Everything that makes a run what it is, in plain values."""
    net, steps = run.model.net, run.trainer.max_steps
    optimizer = run.model.configure_optimizers()["optimizer"]
    groups = [{k: group[k] for k in ("lr", "betas", "eps", "weight_decay")} for group in optimizer.param_groups]
    looked_at = [0, 1, steps // 20, steps // 2, steps]
    rates = learning_rates(run, looked_at)
    return plain({
        "config": what_is_learned(run.resolved),
        "model": {"class": type(net).__name__, "parameters": net.params_total(), "active": net.params_active()},
        "optimizer": {"class": type(optimizer).__name__, "groups": groups},
        "lr_after_step": {str(step): f"{rate:.6e}" for step, rate in zip(looked_at, rates, strict=True)},
        "data": {
            "tokenizer": type(run.datamodule.tokenizer).__name__,
            "vocabulary": run.datamodule.vocab_size,
            "tokens": {split: len(run.datamodule.tokens(split)) for split in ("train", "val")},
        },
        "callbacks": sorted(type(callback).__name__ for callback in run.trainer.callbacks),
    })  # fmt: skip


def journey(folder: Path) -> dict[str, Any]:
    """What each run is. Those with merges across lines are built on the first SHORT_TEXT characters of their text."""
    described, short = {}, folder / "short.txt"
    for name in JOURNEY:
        data = resolve(f"journey/{name}")["data"]
        short.write_text(Path(data["path"]).read_text("utf-8")[:SHORT_TEXT], "utf-8")
        options = ["--data.path", str(short)] if data["bpe_across_lines"] else []
        described[name] = describe(build(f"journey/{name}", options=options))
        described[name]["config"]["data"]["path"] = data["path"]
    return described


def test_the_journey_has_not_changed(tmp_path: Path) -> None:
    files = {path.stem for path in (CONFIGS / "journey").glob("*.yaml")}
    assert files == {*JOURNEY, "on_report_text"}
    stored = json.loads(FIXTURE.read_text("utf-8"))
    now = journey(tmp_path)
    assert now.keys() == stored.keys()
    for name in JOURNEY:
        before, after = dict(flatten(stored[name])), dict(flatten(now[name]))
        newer = {leaf: after.pop(leaf) for leaf in after.keys() - before.keys()}
        assert after == before, name
        newer = {leaf.removeprefix("config.model.init_args."): value for leaf, value in newer.items()}
        assert newer.items() <= NEWER_OPTIONS.items(), f"{name}: a newer option is not off"


NEWER_OPTIONS: dict[str, Any] = {
    "config.data.split": "joint", "config.tensorboard": False, "config.ema_decay": None, "config.init_from": "",
    "config.teachers": "", "config.teacher_weight": 0.5, "qk_norm": False, "attention_every": 1,
}  # fmt: skip
"""Options that are newer than the fixture, with the values that the runs need."""

CLASSIC_PROGRAM = {"warmup_steps": 200, "gelu": "exact", "weight_init": "torch", "attention_output_dropout": False}
"""What the report's classic program does and its parameter table does not say."""


BPE_PROGRAM = {"bpe_across_lines": True, "bpe_train_on": "all", "split_unit": "tokens"}
"""How the report's program makes byte pairs."""


def test_smoke_makes_a_run_of_the_journey_small() -> None:
    for name in TABLE:
        assert dict(flatten(config("smoke"))).items() <= resolved_leaves(f"journey/{name}", "smoke").items(), name


def test_the_runs_of_the_journey_differ() -> None:
    stored = json.loads(FIXTURE.read_text("utf-8"))
    for one, other in combinations(JOURNEY, 2):
        assert stored[one]["config"] != stored[other]["config"], (one, other)


@pytest.mark.parametrize(
    ("before", "after", "changes"),
    [
        ("classic_baseline", "classic_tuned", {"dropout", "weight_decay", "patience"}),
        ("classic_tuned", "p2_refine", {"eval_iters", "patience", "min_delta"}),
        ("p2_refine", "p2_lr1p5e4_refine", {"lr", "patience"}),
        ("classic_baseline", "p3_lr1e4", {"lr", "patience"}),
        ("classic_tuned", "p4_med192", {"n_layer", "n_head", "n_embd", "batch_size", "dropout", "weight_decay"}),
        ("modern_dense_control", "modern_moe", {"n_experts", "moe_gate", "moe_aux_loss_coef"}),
        ("modern_moe", "modern_moe_tuned", {"dropout", "lr", "weight_decay"}),
        ("modern_moe_tuned", "modern_moe_char_01", {"block_size"}),
        ("modern_moe_char_01", "modern_moe_char_02", {"lr", "weight_decay", "moe_aux_loss_coef"}),
        ("modern_dense_control", "bpe_test", {"tokenizer", "bpe_vocab_size", *BPE_PROGRAM}),
        ("bpe_test", "bpe_improved", {"bpe_vocab_size"}),
    ],
)
def test_a_run_of_the_journey_changes_only_what_its_comment_names(before: str, after: str, changes: set[str]) -> None:
    old, new = resolved_leaves(f"journey/{before}"), resolved_leaves(f"journey/{after}")
    assert {name.rpartition(".")[2] for name in old.keys() | new.keys() if old.get(name) != new.get(name)} == changes


def test_modern_dense_is_p2_refine_with_another_decoder() -> None:
    old, new = resolved_leaves("journey/p2_refine"), resolved_leaves("journey/modern_dense")
    unused = {"data.bpe_vocab_size"}
    of_the_classic_program = {f"model.init_args.{name}" for name in CLASSIC_PROGRAM}
    changed = {name for name in old if old[name] != new.get(name)} - unused
    assert changed == {"model.class_path"} | of_the_classic_program


def test_the_classic_runs_have_the_model_and_warm_up_of_the_reports_program() -> None:
    for name in JOURNEY:
        leaves = resolved_leaves(f"journey/{name}")
        if leaves["model.class_path"].endswith("ClassicLM"):
            of_program = {option: leaves[f"model.init_args.{option}"] for option in CLASSIC_PROGRAM}
            assert of_program == CLASSIC_PROGRAM, name
        else:
            assert leaves["model.init_args.warmup_steps"] is None, name


def test_the_journey_does_not_depend_on_default_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs stay as they are if default.yaml has other values, or more options."""
    stored = json.loads(FIXTURE.read_text("utf-8"))

    def other(name: str, value: Any) -> Any:
        if isinstance(value, bool) or name.endswith("class_path"):
            return value
        if isinstance(value, str):
            return {"path": "elsewhere.txt"}.get(name, value)
        return value + 1 if isinstance(value, int) else value / 2

    default = config("default")
    for group in (default["model"]["init_args"], default["data"], default["trainer"], default["samples"]):
        group |= {name: other(name, value) for name, value in group.items()}
    default["seed_everything"] += 1
    default["early_stopping"] = None
    default["model"]["init_args"] |= {
        "n_layer": 7,
        "lr_schedule": "constant",
        "ffn_mult": 3.0,
        "moe_gate": "softmax_all",
    }
    default["data"] |= {
        "tokenizer": "bpe",
        "eval_mode": "sampled",
        "eval_iters": 7,
        "train_frac": 0.5,
        "test_frac": 0.2,
    }
    default["trainer"] |= {"accumulate_grad_batches": 3}
    (tmp_path / "default.yaml").write_text(yaml.safe_dump(default), "utf-8")
    (tmp_path / "journey").symlink_to(CONFIGS / "journey")
    monkeypatch.setattr(options, "CONFIGS", tmp_path)
    unused = {"model.init_args.moe_gate"}  # by a dense model
    for name in JOURNEY:
        before, after = stored[name]["config"], what_is_learned(resolve(f"journey/{name}"))
        dense = before["model"]["init_args"].get("n_experts") == 0
        changed = {leaf for leaf, value in flatten(before) if dict(flatten(after))[leaf] != value}
        assert changed <= (unused if dense else set()), name


def test_two_runs_of_the_table_train_alike_until_the_first_stops(tmp_path: Path) -> None:
    class Hashes(Callback):
        def __init__(self) -> None:
            self.after: list[int] = []

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            self.after.append(hash(b"".join(p.detach().numpy().tobytes() for p in pl_module.parameters())))

    class Followed(MiniGPTCLI):
        def fit(self, model: LightningModule, **kwargs: Any) -> None:
            self.trainer.callbacks.append(hashes)
            super().fit(model, **kwargs)

    tiny = [
        "--model.n_layer", 1, "--model.n_embd", 16, "--model.block_size", 16, "--data.batch_size", 4,
        "--data.eval_every", 2, "--data.max_eval_tokens", 64, "--early_stopping.patience", 1, "--trainer.max_steps", 16,
        "--wandb", "null", "--model.lr", 3e-4, "--model.warmup_steps", 50,
    ]  # fmt: skip
    silence_libraries()
    seen, ends = {}, {}
    for name in ("classic_tuned", "p2_refine"):
        hashes = Hashes()
        words = ["-c", f"journey/{name}", *tiny, "--run_dir", tmp_path / name]
        Followed("fit", [str(word) for word in words])
        seen[name] = hashes.after
        ends[name] = json.loads((tmp_path / name / "summary.json").read_text())
    first = len(seen["classic_tuned"])
    assert ends["classic_tuned"]["stop_reason"] == "early_stopping"
    assert first < len(seen["p2_refine"])
    assert len(set(seen["p2_refine"])) == len(seen["p2_refine"])
    assert seen["p2_refine"][:first] == seen["classic_tuned"]


# The reference report's parameter table, on the objects that are built.

TABLE = {
    "p2_refine": {
        "input_path": "data/input.txt", "train_frac": 0.9, "tokenizer": "char", "block_size": 128, "n_layer": 4,
        "n_head": 4, "n_embd": 128, "dropout": 0.20, "lr": 2e-4, "weight_decay": 0.05, "grad_clip": 1.0,
        "batch_size": 64, "max_steps": 50000, "eval_every": 200, "eval_iters": 80, "seed": 1337, "patience": 20,
        "min_delta": 0.0002,
    },
    "modern_moe_char_02": {
        "input_path": "data/input.txt", "train_frac": 0.9, "tokenizer": "char", "bpe_vocab_size": 256,
        "bpe_min_pair_freq": 2, "block_size": 192, "n_layer": 4, "n_head": 4, "n_embd": 128, "dropout": 0.24,
        "rope_theta": 10000.0, "rms_norm_eps": 1e-8, "ffn_mult": 2.0, "use_moe": True, "n_experts": 4, "moe_top_k": 1,
        "moe_aux_loss_coef": 0.0015, "lr": 9e-5, "weight_decay": 0.08, "grad_clip": 1.0, "batch_size": 48,
        "max_steps": 5000, "eval_every": 100, "eval_iters": 100, "seed": 1337, "patience": 8, "min_delta": 0.0002,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_the_parameter_table_reaches_the_objects(name: str) -> None:
    table, run = TABLE[name], build(f"journey/{name}")
    data, net, trainer = run.datamodule, run.model.net, run.trainer
    data.trainer = trainer
    built: dict[str, set[Any]] = {}

    # The text and its windows.
    text = (PROJECT / "data" / "input.txt").read_text("utf-8")
    built["input_path"] = {str(path.resolve().relative_to(PROJECT)) for path in data.find_files()}
    assert len(data.tokens("train")) == int(table["train_frac"] * len(text))
    assert data.tokenizer.decode(data.tokens("val").tolist()) == text[len(data.tokens("train")) :]
    built["tokenizer"] = {{CharTokenizer: "char", BPETokenizer: "bpe"}[type(data.tokenizer)]}
    inputs, targets = next(iter(data.train_dataloader()))
    built["batch_size"], built["block_size"] = {inputs.size(0), targets.size(0)}, {inputs.size(1), net.block_size}
    assert len(data.train_dataloader()) == table["max_steps"]
    built["max_steps"] = {trainer.max_steps}
    built["eval_every"] = {trainer.val_check_interval, data.config.eval_every}
    assert data.config.eval_mode == "full"
    built["eval_iters"] = {len(data.eval_dataloader("val", sampled=True))}
    for setting in ("bpe_vocab_size", "bpe_min_pair_freq"):  # unused according to the table
        built[setting] = {getattr(data.config, setting)}

    # The model.
    built["n_layer"], built["n_embd"] = {len(net.blocks)}, {net.token_embedding.embedding_dim, net.norm.weight.numel()}
    built["n_head"] = {block.attention.n_head for block in net.blocks}
    dropouts = [module for module in net.modules() if isinstance(module, (Dropout, nn.Dropout))]
    assert len(dropouts) >= 1 + 2 * len(net.blocks)
    built["dropout"] = {module.p for module in dropouts}
    sizes = {
        "vocab_size": data.vocab_size,
        "block_size": table["block_size"],
        "dropout": 0.0,
    }  # with defaults otherwise
    if isinstance(net, ClassicGPT):
        assert net.position_embedding.num_embeddings == table["block_size"]
        twin = ClassicGPT(ClassicConfig(**sizes, weight_init="torch"), seed=table["seed"])
    else:
        assert isinstance(net, ModernGPT)
        built["rms_norm_eps"] = {module.eps for module in net.modules() if isinstance(module, nn.RMSNorm)}
        built["use_moe"] = {bool(list(net.moe_layers()))}
        assert len(list(net.moe_layers())) == len(net.blocks)
        for moe in net.moe_layers():
            assert moe.gate == "softmax_selected"
            built.setdefault("n_experts", set()).update({moe.n_experts, moe.router.out_features, moe.gate_up.size(0)})
            built.setdefault("moe_top_k", set()).add(moe.top_k)
            built.setdefault("ffn_mult", set()).add(moe.gate_up.size(1) / 2 / 128)
        rates = torch.atan2(net.blocks[0].attention.rope.sin[1, 16:], net.blocks[0].attention.rope.cos[1, 16:])
        theta = rates[1].item() ** (-32 / 2)  # the second pair of a head 32 wide turns by theta ** (-2 / 32) a position
        assert theta == pytest.approx(table["rope_theta"], rel=1e-4)
        built["rope_theta"] = {table["rope_theta"]}
        zero, one = torch.zeros(()), torch.ones(())
        assert run.model.total_loss(one, zero) == 1
        built["moe_aux_loss_coef"] = {round(run.model.total_loss(zero, one).item(), 9)}
        modern = {"ffn_mult": 2.0, "n_experts": 4, "moe_gate": "softmax_selected", "tie_embeddings": True}
        modern |= {"zero_init": False, "conv_kernel_size": 0, "qk_norm": False, "attention_every": 1, **sizes}
        twin = ModernGPT(ModernConfig(**modern), seed=table["seed"])
    same = [torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True)]
    assert all(same), "the weights are drawn from the seed"
    built["seed"] = {data.config.seed}

    # The optimizer, and when training ends.
    optimizer = run.model.configure_optimizers()["optimizer"]
    assert type(optimizer) is torch.optim.AdamW
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == net.params_total()
    built["weight_decay"] = {group["weight_decay"] for group in optimizer.param_groups}
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.9, 0.999), 1e-8)}
    warmup, last = {"p2_refine": 200, "modern_moe_char_02": 250}[name], table["max_steps"]
    lr = table["lr"]
    seen = learning_rates(run, [0, warmup - 1, warmup, (warmup + last) // 2, last])
    assert seen == pytest.approx([lr / warmup, lr, lr, 0.55 * lr, 0.1 * lr], rel=1e-6)
    built["lr"], built["grad_clip"] = {run.model.config.lr}, {trainer.gradient_clip_val}
    (early,) = (c for c in trainer.callbacks if isinstance(c, ValLossEarlyStopping))
    assert (early.monitor, early.mode) == ("val/loss", "min")
    built["patience"], built["min_delta"] = {early.patience}, {abs(early.min_delta)}
    kinds = {type(callback) for callback in trainer.callbacks}
    assert {BestCheckpoint, LastCheckpoint, GracefulStop} <= kinds
    assert SampleCallback not in kinds

    built["train_frac"] = {data.config.train_frac}
    assert {setting: {value} for setting, value in table.items()} == {k: v for k, v in built.items() if k in table}


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        FIXTURE.write_text(json.dumps(journey(Path(folder)), indent=1) + "\n", "utf-8")
    sys.exit(0)
