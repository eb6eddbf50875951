"""The prompts of `predict`: their options, the file that they may stand in, and their token ids.

How they are continued is in `generation`; `training.sampling.PredictionWriter` writes the text.
"""

from dataclasses import dataclass
from pathlib import Path

from minigpt_pl.data.tokenizer import Tokenizer
from minigpt_pl.generation.generate import SamplingConfig
from minigpt_pl.runtime.errors import UserError


@dataclass
class PromptConfig:
    """What `predict` continues.

    Args:
        prompt: Text to continue. Default: a line break.
        prompt_file: File with one prompt per line.
    """

    prompt: str = ""
    prompt_file: str = ""


@dataclass
class PredictConfig(SamplingConfig, PromptConfig):
    """The prompts of `predict`, and how they are continued."""


def encode_prompts(config: PredictConfig, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of the prompts of predict.

    Raises:
        UserError: If the file cannot be used, or a prompt has characters that the model never saw.
    """
    ids, file = [], config.prompt_file
    for number, prompt in enumerate(read_prompts(config.prompt, file), 1):
        try:
            ids.append(tokenizer.encode_prompt(prompt))
        except UserError as error:
            name, value, line = ("prompt_file", file, f"line {number}: ") if file else ("prompt", prompt, "")
            problem = f"{line}{error.problem}"
            raise UserError(problem, option=f"sample.{name}", value=value, remedy=error.remedy) from None
    return ids


def read_prompts(prompt: str, file: str) -> list[str]:
    """The prompts of predict: the given one, or one for each line of a file."""
    if not file:
        return [prompt]
    if prompt:
        remedy = "use one of them"
        raise UserError("sample.prompt is set too", option="sample.prompt_file", value=file, remedy=remedy)
    try:
        lines = Path(file).read_text("utf-8-sig").split("\n")
    except OSError as error:
        problem = f"the file cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        problem = f"the file is not UTF-8: byte {error.start}"
    else:
        if lines[-1] == "":
            lines.pop()
        if lines:
            return lines
        problem = "the file is empty"
    raise UserError(
        problem, option="sample.prompt_file", value=file, remedy="name a text file with one prompt per line"
    )
