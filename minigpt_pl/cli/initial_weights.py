"""`fit --init_from`: a new run that takes weights, sizes and the kind of tokenizer from a checkpoint, and nothing else.

How the weights are copied is in `training.fine_tuning`; runs that continue from a checkpoint start in `start`.
"""

from pathlib import Path
from typing import Any, NamedTuple

from minigpt_pl.cli.classes import class_name
from minigpt_pl.cli.options import UserOption, flatten, option_name
from minigpt_pl.cli.start import read_start
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.training.fine_tuning import copy_weights
from minigpt_pl.training.lit_modules import MODELS, LanguageModel
from minigpt_pl.training.optim import OptimizerConfig

FREE = OptimizerConfig.__dataclass_fields__.keys() | {"weight_init", "zero_init"}
"""Arguments of a model that its trained weights do not depend on, beside its `mutable_args`."""
TOKENIZER = ("tokenizer", "bpe_vocab_size", "bpe_min_pair_freq", "bpe_across_lines", "bpe_train_on")
"""Options of the data that decide which tokens there are."""


class InitialWeights(NamedTuple):
    """A checkpoint to start from: its path, its contents, and the configuration that the new run takes from it.

    Without a checkpoint its methods do nothing.
    """

    path: Path | None = None
    checkpoint: dict[str, Any] = {}
    config: dict[str, Any] = {}

    @property
    def parent(self) -> tuple[str | None, int | None]:
        """Path and step."""
        return (str(self.path), self.checkpoint["global_step"]) if self.path else (None, None)

    def check(self, resolved: dict[str, Any]) -> None:
        """Raises UserError if the user has set a size to another value than the checkpoint's."""
        if not self.path:
            return
        given = {option_name(name): value for name, value in flatten(resolved)}
        for full_name, value in flatten({"model": self.config["model"]}):
            name = option_name(full_name)
            differs = class_name(resolved) != class_name(self.config) if name == "model" else given.get(name) != value
            if differs:
                problem = f"{self.path} was trained with {str(value).removeprefix('minigpt_pl.')}"
                remedy = "leave it out: its weights have this size"
                raise UserError(problem, option=name, value=given.get(name), remedy=remedy)

    def copy_into(self, model: LanguageModel, data: TextDataModule) -> list[str]:
        """Copies the weights; returns a line about the rows of tokens, or none."""
        if not self.path:
            return []
        copied, new = copy_weights(model, self.checkpoint, data.tokenizer)
        return [f"init_from {self.path}: the rows of {copied} tokens are copied, {new} tokens begin as in a new model"]


def initial_weights(
    user_options: list[UserOption],
    args: list[str],
    data_class: type[TextDataModule] | None,
    started: dict[str, Any],
) -> InitialWeights:
    """The checkpoint that init_from names, on the command line or in a file; none if another one is `started` from.

    Raises:
        UserError: If it cannot be used.
    """
    paths = [option.value for option in user_options if option.name == "init_from"]
    if started or not paths or not paths[-1]:
        return InitialWeights()
    path = Path(paths[-1]).expanduser()
    try:
        checkpoint, config = read_start(path, args, False, data_class or TextDataModule)
    except UserError as error:
        option = "init_from" if error.option == "ckpt_path" else error.option
        raise UserError(error.problem, option=option, value=error.value, remedy=error.remedy) from error
    model, data = config["model"], config["data"]
    free = FREE | MODELS[class_name(config)].mutable_args
    sizes = {name: value for name, value in model["init_args"].items() if name not in free}
    taken = {
        "model": {"class_path": model["class_path"], "init_args": sizes},
        "data": {name: data[name] for name in TOKENIZER if name in data},
    }
    return InitialWeights(path, checkpoint, taken)
