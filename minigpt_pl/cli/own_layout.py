"""This project's own layout of an exported folder: a config.json, and a modeling_minigpt.py that stands alone.

The file is `modeling_minigpt` with the sources of the layers that it imports. Layouts of transformers itself are in
`native_layouts`.
"""

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minigpt_pl.cli.native_layouts import Layout
from minigpt_pl.models.ablations import STAGES
from minigpt_pl.models.blocks import MLP, RMSNorm
from minigpt_pl.models.gpt import GPT, ClassicGPT, ModernGPT
from minigpt_pl.models.moe import MoE
from minigpt_pl.runtime.errors import UserError

MODELING_FILE = "modeling_minigpt.py"
HEADER = "# Written by minigpt export from the layers of minigpt_pl {version}. It needs torch and transformers alone.\n"


def own_layout_obstacle(model: GPT) -> UserError | None:
    """Why a model cannot be exported at all; None if it can be."""
    if type(model) in (ClassicGPT, ModernGPT, *STAGES.values()):
        return None
    problem = f"only models of minigpt_pl can be exported, not {type(model).__name__}"
    return UserError(problem, remedy="train a ClassicLM, a ModernLM or an AblationLM")


def own_layout(model: GPT) -> Layout:
    """The config.json and the named weights; the names are those of the model.

    Raises:
        UserError: If the model is not of this project.
    """
    if obstacle := own_layout_obstacle(model):
        raise obstacle
    block: Any = model.blocks[-1]  # it has attention
    attention, feed_forward = block.attention, block.feed_forward
    is_tied = model.head.weight is model.token_embedding.weight
    config: dict[str, Any] = {
        "model_type": "minigpt", "architectures": ["MiniGPTForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_minigpt.MiniGPTConfig",
            "AutoModelForCausalLM": "modeling_minigpt.MiniGPTForCausalLM",
        },
        "vocab_size": model.head.out_features, "hidden_size": model.head.in_features,
        "num_hidden_layers": len(model.blocks), "num_attention_heads": attention.n_head,
        "max_position_embeddings": model.block_size, "tie_word_embeddings": is_tied,
        "norm": "rms" if isinstance(block.norm_1, RMSNorm) else "layer", "norm_eps": block.norm_1.eps,
        "linear_bias": attention.qkv.bias is not None,
        "rotary_theta": None if attention.rope is None else attention.rope.theta,
        "qk_norm_eps": attention.qk_norm_eps, "attention_layers": model.attention_layers(),
        "conv_kernel_size": 0 if block.conv_1 is None else len(block.conv_1.weight),
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    if isinstance(feed_forward, MoE):
        config |= {"feed_forward": "moe", "intermediate_size": feed_forward.down.size(2)}
        config |= {"n_experts": feed_forward.n_experts, "moe_top_k": feed_forward.top_k, "moe_gate": feed_forward.gate}
    elif isinstance(feed_forward, MLP):
        config |= {"feed_forward": "mlp", "intermediate_size": feed_forward.down.in_features, "gelu": feed_forward.gelu}
    else:
        config |= {"feed_forward": "swiglu", "intermediate_size": feed_forward.down.in_features}
    weights = dict(model.state_dict())
    if is_tied:
        del weights["head.weight"]
    return config, weights


def modeling_source(version: str) -> str:
    """The text of modeling_minigpt.py."""
    template = Path(__file__).with_name(MODELING_FILE).read_text("utf-8")
    tree = ast.parse(template)
    own = [node for node in tree.body if isinstance(node, ast.ImportFrom) and _is_own(node)]
    modules = [_module_source(str(node.module)) for node in own]
    pairs = [(modules[i], alias.name) for i, node in enumerate(own) for alias in node.names]
    parts = [_definition(source, name) for source, name in pairs]
    parts.sort(key=lambda part: part.startswith(("class ", "def ", "@")))  # constants first: annotations name them
    used = {node.id for part in parts for node in ast.walk(ast.parse(part)) if isinstance(node, ast.Name)}
    imports = _library_imports(template, None)
    for source in modules:
        for start, names in _library_imports(source, used).items():
            imports[start] = imports.get(start, set()) | names
    lines = [f"{start} {', '.join(sorted(names))}" for start, names in imports.items()]
    about = (ast.get_docstring(tree) or "").split("\n\n")
    head = f'{HEADER.format(version=version)}"""{about[0]}\n\n{about[-1]}\n"""\n\n' + "\n".join(sorted(lines))
    rest = "\n".join(template.splitlines()[own[-1].end_lineno :])
    return "\n\n\n".join([head, *parts, rest.strip()]) + "\n"


def _is_own(node: ast.ImportFrom) -> bool:
    return str(node.module).startswith("minigpt_pl.")


def _module_source(name: str) -> str:
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text("utf-8")


def _definition(source: str, name: str) -> str:
    """The source of a class, function or constant of a module."""
    for node in ast.parse(source).body:
        is_definition = isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name
        if is_definition or isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
            return "\n".join(source.splitlines()[first - 1 : node.end_lineno])
    raise AssertionError(f"{name} is not defined there")


def _library_imports(source: str, used: set[str] | None) -> dict[str, set[str]]:
    """What a module imports of other packages, by the start of the statement; of the `used` names only, if given."""
    found: dict[str, set[str]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import) or isinstance(node, ast.ImportFrom) and not _is_own(node):
            names = {ast.unparse(alias) for alias in node.names if used is None or (alias.asname or alias.name) in used}
            start = f"from {node.module} import" if isinstance(node, ast.ImportFrom) else "import"
            found |= {start: found.get(start, set()) | names} if names else {}
    return found
