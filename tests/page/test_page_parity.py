"""The models of the page, in a browser, against torch: logits, greedy and sampled text, for every kind of model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.browser import opened
from support.tiny_models import VOCAB, lively, redraw, some_ids

from minigpt_pl.data.tokenizer import BPETokenizer, CharTokenizer, Tokenizer
from minigpt_pl.generation.generate import SamplingConfig, generate, sample_uniforms
from minigpt_pl.models.ablations import STAGES
from minigpt_pl.models.attention import split_qkv_heads
from minigpt_pl.models.config import AblationConfig
from minigpt_pl.models.gpt import GPT
from minigpt_pl.page.build import render_page
from minigpt_pl.page.models import model_spec, packed_weights, tokenizer_spec

LENGTH = 200
TO_TORCH, TO_ROUNDED = 2e-2, 1e-4  # largest difference of a logit: of float16 weights, and on the same weights


def stage(name: Any) -> GPT:
    sizes = {"vocab_size": VOCAB, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32, "dropout": 0.0}
    model = STAGES[name](AblationConfig(**sizes, stage=name), 1).eval()
    redraw(model)
    return model


MODELS = {
    "classic": lambda: lively("classic"),
    "classic, exact GELU": lambda: lively("classic", gelu="exact"),
    "RMSNorm in the classic": lambda: stage("rmsnorm"),
    "RoPE in the classic": lambda: stage("rope"),
    "modern, tied": lambda: lively("dense"),
    "modern, not tied": lambda: lively("dense", tie_embeddings=False),
    "short convolutions": lambda: lively("recipes"),
    "normalised queries and keys": lambda: lively("qk_norm", rms_norm_eps=0.1),
    "attention in every second block": lambda: lively("alternating"),
    "attention in the last block, experts": lambda: lively("qk_norm", attention_every=9),
    "MoE, top 1, softmax_all": lambda: lively("switch"),
    "MoE, top 2, softmax_selected": lambda: lively("mixtral"),
    "MoE, top 3, softmax_all, convolutions": lambda: lively("switch", moe_top_k=3, conv_kernel_size=2),
    "one layer, window of one": lambda: lively("dense", n_layer=1, block_size=1),
}


def write_page(path: Path, models: list[GPT], tokenizer: Tokenizer) -> None:
    entries, weights = [], []
    for i, model in enumerate(models):
        shapes, packed = packed_weights(model)
        entries.append({"name": f"model {i}", "spec": model_spec(model), "shapes": shapes, "step": 0})
        weights.append(packed)
    payload = {
        "title": "parity", "models": entries, "tokenizer": tokenizer_spec(tokenizer), "text": None, "training_text": "",
        "runs": [], "prompt": "", "live": False,
    }  # fmt: skip
    path.write_text(render_page(payload, weights), "utf-8")


def letters(count: int) -> CharTokenizer:
    return CharTokenizer("".join(map(chr, range(65, 65 + count))))


def rounded(model: GPT) -> GPT:
    """The same model with the weights that float16 holds."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    return model


def ask(tab: Any, question: str, **content: Any) -> Any:
    """The worker's answer; typed arrays become lists."""
    tab.wait_for_selector("[role=tab]")
    script = """async ([question, content]) => {
        const parts = [], answer = await minigpt.client.ask(question, content, (part) => parts.push(...part));
        const plain = (key, value) => (ArrayBuffer.isView(value) ? [...value] : value);
        return JSON.parse(JSON.stringify({ answer, parts }, plain));
    }"""
    return tab.evaluate(script, [question, content])


@pytest.mark.parametrize("kind", MODELS)
def test_the_browser_computes_what_torch_does(
    kind: str, browser: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = MODELS[kind]()
    write_page(tmp_path / "page.html", [model], letters(VOCAB))
    ids = some_ids(1, model.block_size, seed=5)
    prompt = some_ids(min(7, model.block_size), seed=6).tolist()
    greedy, sampling = (
        SamplingConfig(max_new_tokens=LENGTH, temperature=t, top_k=k, top_p=p)
        for t, k, p in ((0, 0, 1), (0.9, 12, 0.9))
    )
    draws = sample_uniforms(sampling.seed, prompt, 0, LENGTH).tolist()
    with opened(browser, tmp_path / "page.html") as tab:
        logits = torch.tensor(ask(tab, "logits", model=0, ids=ids[0].tolist())["answer"])
        texts, speed = {}, 0.0
        for name, options in {"greedy": greedy, "sampled": sampling}.items():
            values = {key: getattr(options, key) for key in ("temperature", "top_k", "top_p", "seed")}
            answer = ask(tab, "generate", model=0, prompt=prompt, sampling=values, draws=draws, count=LENGTH)
            texts[name] = [part["id"] for part in answer["parts"]]
            speed = max(speed, answer["answer"]["tokensPerSecond"])
    with torch.no_grad():
        assert (logits - model(ids)[0][0]).abs().max() < TO_TORCH
        model = rounded(model)
        error = (logits - model(ids)[0][0]).abs().max().item()
    wanted = {
        name: [token for (token,) in generate(model, prompt, s)]
        for name, s in (("greedy", greedy), ("sampled", sampling))
    }
    with capsys.disabled():
        equal = "yes" if texts == wanted else "no"
        print(f"\n{kind:40}worst logit error {error:.1e}  text equal {equal:5}{speed:,.0f} tokens/s", end="")
    assert error < TO_ROUNDED
    assert texts == wanted


def test_what_happened_inside_is_what_torch_computes(browser: Any, tmp_path: Path) -> None:
    """Attention of the last layer, the router, and the prediction after the last layer."""
    model = rounded(lively("mixtral"))
    seen: dict[str, Any] = {}
    block: Any = model.blocks[-1]
    block.attention.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    block.feed_forward.router.register_forward_hook(lambda module, args, out: seen.update(router=out.softmax(-1)))
    write_page(tmp_path / "page.html", [lively("mixtral")], letters(VOCAB))
    ids, row = some_ids(1, 16, seed=5), 11
    with torch.no_grad():
        logits = model(ids)[0][0, row]
        qkv = block.attention.qkv(seen["x"]).view(1, 16, 3, 4, 8)
        q, k, _ = split_qkv_heads(qkv, block.attention.rope)
        attention = (q[0, :, row].unsqueeze(1) @ k[0, :, : row + 1].mT / 8**0.5).softmax(-1)[:, 0]
    with opened(browser, tmp_path / "page.html") as tab:
        trace = ask(tab, "trace", model=0, ids=ids[0].tolist(), row=row)["answer"]
        again = ask(tab, "trace", model=0, ids=ids[0].tolist(), row=3)["answer"]  # an earlier row of the same window
    assert torch.allclose(torch.tensor(trace["attention"][-1]), attention, atol=1e-5)
    assert torch.allclose(torch.tensor(trace["router"][-1]), seen["router"][row], atol=1e-5)
    assert [id for id, _ in trace["lens"][-1][:3]] == logits.topk(3).indices.tolist()
    assert len(again["attention"][0][0]) == 4


TEXT = "the cat sat on the mat\nthe hat of the cat\nthat theatre zzz zz zzzzz\n" * 3


@pytest.mark.parametrize("max_line", [None, 1024, 7])
def test_the_browser_merges_as_the_tokenizer_does(max_line: int | None, browser: Any, tmp_path: Path) -> None:
    tokenizer = BPETokenizer.train("".join(sorted(set(TEXT))), [TEXT], 40, 2, max_line)
    model = lively("dense", vocab_size=len(tokenizer.vocabulary))
    write_page(tmp_path / "page.html", [model], tokenizer)
    sample = TEXT[5:90] + "a hat\n\nthat" + TEXT
    with opened(browser, tmp_path / "page.html") as tab:
        tab.wait_for_selector("[role=tab]")
        found = tab.evaluate(
            "(text) => { const { ids, unknown } = minigpt.tokenizer.encode(text); return [ids, [...unknown]]; }",
            sample + "Z",
        )
    assert found == [tokenizer.encode(sample).tolist(), ["Z"]]


def test_a_surprise_is_the_loss_of_torch(browser: Any, tmp_path: Path) -> None:
    model = rounded(lively("classic"))
    write_page(tmp_path / "page.html", [model], letters(VOCAB))
    ids = some_ids(1, 17, seed=8)
    with torch.no_grad():
        log_probs = model(ids[:, :-1])[0][0].log_softmax(-1)
    nats = -log_probs.gather(1, ids[0, 1:, None])[:, 0]
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    ranks = 1 + (log_probs > -nats[:, None]).sum(-1)
    with opened(browser, tmp_path / "page.html") as tab:
        content = {"model": 0, "ids": ids[0, :-1].tolist(), "targets": ids[0, 1:].tolist()}
        found = ask(tab, "read", **content)["answer"]["predictions"]
    assert torch.allclose(torch.tensor([p["nats"] for p in found]), nats, atol=1e-4)
    assert torch.allclose(torch.tensor([p["entropy"] for p in found]), entropy, atol=1e-4)
    assert [p["rank"] for p in found] == ranks.tolist()
