"""A module of a user's own classes as text, and a Python that has not seen it before.

What the classes do shows in a run: another loss, another optimizer, another network, other training windows.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minigpt_pl.data.datamodule import DATA_MODULES
from minigpt_pl.training.lit_modules import MODELS

MODULE = '''
from pathlib import Path

import torch
from torch import nn

from minigpt_pl import ModernLM, TextDataModule
from minigpt_pl.models.gpt import GPT, init_weights
from minigpt_pl.training.lit_modules import LanguageModel, LanguageModelConfig

mark = Path(__file__).with_name("imported")
mark.exists() or mark.touch()


class MyLM(ModernLM):
    """ModernLM with a scaled loss and SGD.

    Args:
        my_factor: Scale of the loss.
    """

    def __init__(self, my_factor: float = 0.5, my_note=None, **config):
        super().__init__(**config)
        self.my_factor = my_factor

    def total_loss(self, loss, aux_loss):
        return self.my_factor * super().total_loss(loss, aux_loss)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), self.config.lr, momentum=0.9)


class MeanBlock(nn.Module):
    """Adds a function of the mean of all positions so far."""

    def __init__(self, width):
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, x, cache=None):
        count = torch.arange(1, x.size(1) + 1, device=x.device)[:, None]
        return x + self.mix(x.cumsum(1) / count).tanh(), None


class MeanGPT(GPT):
    def __init__(self, config, seed):
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(MeanBlock(config.n_embd) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size)
        init_weights(self, seed, {}, 0.2)

    def embed(self, ids):
        return self.token_embedding(ids)

    def lookup_params(self):
        return self.token_embedding.weight.numel()


class MeanLM(LanguageModel):
    def __init__(self, **config):
        args = LanguageModelConfig(**config)
        super().__init__(MeanGPT(args, seed=torch.initial_seed()), args)


class MyData(TextDataModule):
    """Its training windows are noisy.

    Args:
        my_noise: Share of the training inputs that are replaced.
    """

    def __init__(self, my_noise: float = 0.3, **config):
        super().__init__(**config)
        self.my_noise = my_noise

    def train_dataloader(self):
        loader = super().train_dataloader()
        loader.dataset.token_noise = self.my_noise
        return loader


class OtherData(MyData):
    pass


class NotALM(nn.Module):
    pass


class FixedLM(ModernLM):
    def __init__(self, dropout: float = 0.0, **config):
        super().__init__(n_layer=2, dropout=dropout, **config)


Alias, TABLE = MyLM, {}


class NumbersLM(ModernLM):
    def __init__(self, **config):
        super().__init__(**config)
        self.spread = self.net.head.weight.std().item()


class FailingLM(ModernLM):
    def __init__(self, **config):
        super().__init__(**config)
        self.width = config["n_embd"] + "1"
'''


NAMES = {"my_module", "moved", "typed", "failing", "lacking", "taken"}
"""Of the modules that the tests write."""


def write_module(directory: Path, name: str = "my_module") -> None:
    """Writes the module; the file "imported" beside it exists once it is imported."""
    (directory / f"{name}.py").write_text(MODULE, "utf-8")


def forget() -> None:
    """Removes the tests' modules and their classes, as in a new process."""
    for module in NAMES:
        sys.modules.pop(module, None)
    for classes in (MODELS, DATA_MODULES):
        for name in [name for name, cls in classes.items() if cls.__module__ in NAMES]:
            del classes[name]


@contextmanager
def new_python() -> Iterator[None]:
    """Forgets the tests' modules before and after; writes no byte code, and leaves sys.path as it was."""
    path, wrote, sys.dont_write_bytecode = list(sys.path), sys.dont_write_bytecode, True
    forget()
    try:
        yield
    finally:
        forget()
        sys.path[:], sys.dont_write_bytecode = path, wrote
