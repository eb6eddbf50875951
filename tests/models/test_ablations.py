"""The ablations: the first and last stage are ClassicGPT and ModernGPT bit by bit, and each stage changes one part."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, TINY, Outcome

from minigpt_pl import load_checkpoint
from minigpt_pl.experiments.results import run_differences
from minigpt_pl.experiments.spec import read_study, resolve_config
from minigpt_pl.generation.incremental import make_decode_fn
from minigpt_pl.models.ablations import STAGES, AblationGPT
from minigpt_pl.models.config import ClassicConfig, GPTConfig, ModernConfig
from minigpt_pl.models.gpt import ClassicGPT, ModernGPT

SIZES = {"vocab_size": 19, "block_size": 12, "n_layer": 3, "n_head": 2, "n_embd": 16, "dropout": 0.0}
STUDY = read_study(PROJECT / "configs" / "studies" / "ablations.yaml")


def stage(name: str, seed: int = 5) -> AblationGPT:
    return STAGES[name](GPTConfig(**SIZES), seed).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.arange(24).view(2, 12) % 19)[0]


def test_the_first_stage_is_classic_gpt_and_the_last_is_modern_gpt() -> None:
    plain = {"zero_init": False, "conv_kernel_size": 0, "qk_norm": False, "attention_every": 1}
    modern = ModernConfig(**SIZES, tie_embeddings=True, **plain)
    ends = ("classic", ClassicGPT(ClassicConfig(**SIZES), 5)), ("tied", ModernGPT(modern, 5))
    for name, model in ends:
        model.eval()
        mine, theirs = stage(name).state_dict(), model.state_dict()
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
        assert torch.equal(logits(stage(name)), logits(model))
        assert stage(name).flops_per_token() == model.flops_per_token()


def parts(model: torch.nn.Module) -> dict[str, str]:
    return {name: repr(module) for name, module in model.named_modules() if not list(module.children())}


@pytest.mark.parametrize(
    ("above", "below", "replaced"),
    [
        ("rmsnorm", "classic", ("norm", "attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down")),
        ("rope", "rmsnorm", ("position_embedding", "attention.rope")),
        ("swiglu", "rope", ("feed_forward",)),
        ("tied", "swiglu", ()),
    ],
)
def test_a_stage_replaces_its_part_alone(above: str, below: str, replaced: tuple[str, ...]) -> None:
    now, was = parts(stage(above)), parts(stage(below))
    changed = {name for name in now.keys() | was.keys() if now.get(name) != was.get(name)}
    assert all(any(part in name for part in replaced) for name in changed)
    assert all(any(part in name for name in changed) for part in replaced)
    assert not torch.equal(logits(stage(above)), logits(stage(below)))
    assert stage(above).params_total() < stage(below).params_total()
    if above == "rmsnorm":
        assert not any(name.endswith("bias") for name, _ in stage(above).named_parameters())
    if above == "tied":
        tied, untied = stage(above), stage(below)
        assert tied.head.weight is tied.token_embedding.weight
        assert untied.head.weight is not untied.token_embedding.weight


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_causal_and_generates_as_it_reads(name: str) -> None:
    model, ids = stage(name), torch.arange(12).view(1, 12) % 19
    other = ids.clone()
    other[:, -1] = 18
    assert torch.equal(model(ids)[0][:, :-1], model(other)[0][:, :-1])
    cache = model.new_cache()
    model(ids[:, :6], cache)
    torch.testing.assert_close(make_decode_fn(model, cache)(ids[:, 6]), model(ids[:, :7])[0][:, -1])


def test_a_stage_is_trained_and_loaded(minigpt: Callable[..., Outcome], tmp_path: Path, text_file: Path) -> None:
    words = ("fit", *TINY, "--model", "AblationLM", "--model.stage", "rope", "--data.path", text_file)
    done = minigpt(*words, "--run_dir", tmp_path / "run")
    assert done.status == 0, done.err
    assert type(load_checkpoint(tmp_path / "run" / "best.ckpt").model) is STAGES["rope"]
    assert minigpt("predict", "--ckpt_path", tmp_path / "run" / "best.ckpt", "--sample.max_new_tokens", 3).status == 0
    wrong = minigpt(*words[:-4], "--model.stage", "nix", "--run_dir", tmp_path / "no")
    assert wrong.status == 2
    assert "it must be classic or rmsnorm or rope or swiglu or tied" in wrong.err


def test_each_stage_of_the_study_changes_what_it_names() -> None:
    found = {name: resolve_config(variant.args) for name, variant in STUDY.variants.items()}
    large = found.pop("dense_as_large")  # beside the steps, which are nine
    assert {line.partition(":")[0] for line in run_differences(found["context"], large)} == {"model.ffn_mult"}
    width, experts = large["model"]["init_args"]["ffn_mult"], found["experts_learning"]["model"]["init_args"]
    assert width == experts["ffn_mult"] * experts["n_experts"]
    settings = list(found.values())
    assert len(settings) == 9
    assert {one["trainer"]["max_steps"] for one in settings} == {2000}
    tokens = {one["data"]["batch_size"] * one["model"]["init_args"]["block_size"] for one in settings}
    assert len(tokens) == 1
    names = list(found)
    changes = {
        name: {line.partition(":")[0] for line in run_differences(was, now)}
        for name, was, now in zip(names[1:], settings[:-1], settings[1:], strict=True)
    }
    assert changes["regularised"] == {"model.dropout", "model.weight_decay"}
    assert changes["context"] == {"model.block_size", "data.batch_size"}
    assert changes["experts_constant"] == {"model.n_experts", "model.moe_gate", "model.moe_aux_loss_coef"}
    assert changes["experts_learning"] == {"model.moe_gate"}
    for name in ("rope", "swiglu"):
        assert changes[name] == {"model.stage"}
    for pair in STUDY.comparisons:  # of neighbours, and of pairs that see equal batches
        assert names.index(pair[0]) - names.index(pair[1]) == 1
