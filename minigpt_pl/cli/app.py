"""The command line of fit, validate, test and predict: how defaults, a checkpoint, files and flags become one run.

What wins, from weak to strong: the code, configs/default.yaml, the checkpoint, then files and flags in their order.
Commands and exit statuses are in `__main__`; what is known of a setting in `settings`, how a mistake in one is said in
`mistakes`, what --help shows in `helptext`; how a run trains in `training`.
"""

import argparse
import re
import warnings
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from minigpt_pl.checkpoint.io import BEST_CKPT, AtomicCheckpointIO, find_checkpoint, read_checkpoint
from minigpt_pl.checkpoint.run_dir import resolve_run_dir
from minigpt_pl.checkpoint.validation import validate_config, validate_sizes
from minigpt_pl.cli import errors, help
from minigpt_pl.cli.options import (
    CONFIGS,
    FIT_ONLY,
    PATH_OPTIONS,
    RESERVED,
    CheckpointConfig,
    PredictConfig,
    config_diff,
    option_name,
    resolve_config_names,
    user_options,
)
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.generation.generate import SamplingConfig
from minigpt_pl.runtime import signals
from minigpt_pl.runtime.errors import UserError, rank_zero_print
from minigpt_pl.training.fit import FitRunner
from minigpt_pl.training.lit_modules import MODELS, LanguageModel
from minigpt_pl.training.loggers import WandbConfig
from minigpt_pl.training.sampling import PredictionWriter, SampleCallback, generate_sample, read_prompts
from minigpt_pl.training.stopping import ValLossEarlyStopping
from minigpt_pl.training.summary import format_summary, resume_command

IMMUTABLE_DATA = {  # settings of the data under which a checkpoint's figures would mean something else
    "fit": {"tokenizer", "bpe_vocab_size", "bpe_min_pair_freq", "train_frac", "test_frac"},
    "validate": {"tokenizer", "bpe_vocab_size", "bpe_min_pair_freq", "train_frac"},
}
CONFIG_ERRORS = (ValueError, TypeError, OSError, ImportError, MisconfigurationException)  # while building


def run(command: str, options: list[str]) -> int:
    """Runs fit, validate, test or predict; returns the exit status."""
    help.silence_libraries()
    if help.is_help_request(options):
        print(help.render_help(command, options))
        return 0
    try:
        return MiniGPTCLI(command, options).status
    finally:
        signals.defer(False)
        signals.exit_hooks.clear()


class MiniGPTCLI(LightningCLI):
    """LightningCLI with this project's order of settings, its run directory and its checkpoints."""

    def __init__(self, command: str, options: list[str]):
        self.command, self.fits, self.status = command, command == "fit", 0
        self.words = resolve_config_names(options)
        self.given = user_options(self.words)
        self.ckpt_path: Path | None = None
        self.saved: dict[str, Any] = {}
        self.resuming = False
        self.notes: list[str] = []
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module="jsonargparse")
                super().__init__(
                    LanguageModel,
                    TextDataModule,
                    subclass_mode_model=True,
                    save_config_callback=None,
                    seed_everything_default=self.fits,
                    auto_configure_optimizers=False,
                    load_from_checkpoint_support=False,
                    parser_kwargs={
                        "exit_on_error": False,  # errors are raised, and main() says them
                        "allow_abbrev": False,
                        command: {"default_config_files": [CONFIGS / "default.yaml"] if self.fits else []},
                    },
                )
        except UserError as error:
            raise UserError(errors.as_typed(str(error), self.given, command)) from error
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
                lower = "--data.batch_size, --model.block_size or --model.n_embd"
                raise UserError(f"there is not enough memory: lower {lower}") from error
            raise

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # one parser, not four
        known = super().subcommands()[self.command]
        return {self.command: known | {"verbose", "return_predictions", "weights_only"}}

    # What may be said.

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        seed = None if self.fits else 0  # default.yaml has it; the other commands draw nothing but samples
        parser.add_argument("--seed_everything", type=int, default=seed)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str, default="")
        # With a default class, None is no part of the type, and errors are short.
        parser.add_subclass_arguments(LanguageModel, "model", default={"class_path": "ModernLM"}, fail_untyped=False)
        parser.add_lightning_class_args(TextDataModule, "data")
        parser.add_class_arguments(
            Trainer, "trainer", instantiate=False, skip=RESERVED.keys() | (set() if self.fits else FIT_ONLY)
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data", "model.init_args.vocab_size", self.vocab_size, apply_on="instantiate")
        parser.link_arguments("model.init_args.block_size", "data.block_size")
        parser.link_arguments("seed_everything", "data.seed")
        if self.fits:
            parser.add_class_arguments(CheckpointConfig, "checkpoint")
            parser.add_argument("--early_stopping", type=ValLossEarlyStopping | None)
            parser.add_argument("--samples", type=SampleCallback | None, default=None)
            parser.add_argument("--wandb", type=WandbConfig | None, default=WandbConfig())
        if self.command == "predict":
            parser.add_class_arguments(PredictConfig, "sample")

    # What is meant.

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        errors.validate_options(self.given)
        places = {name: self.last_given(name) for name in PATH_OPTIONS}
        settings: dict[str, Any] = {}
        if places["ckpt_path"]:
            self.ckpt_path = find_checkpoint(places["ckpt_path"], places["run_dir"])
            if self.fits and places["ckpt_path"] == "best":
                raise UserError(
                    f"--ckpt_path best: a run goes on from last; to branch off its best, give "
                    f"--ckpt_path {self.ckpt_path} --run_dir NEW"
                )
            try:
                self.saved = read_checkpoint(self.ckpt_path)
                settings = validate_config(self.saved["settings"], self.ckpt_path, self.words)
                validate_sizes(self.saved, MODELS)
            except UserError as error:
                problem, path = str(error).removeprefix("the checkpoint "), str(self.ckpt_path)
                colon = "" if path == places["ckpt_path"] and problem.startswith(path) else f"{places['ckpt_path']}: "
                raise UserError(f"--ckpt_path {colon}{problem}") from error
            if not self.fits:
                settings = {key: settings[key] for key in ("model", "data", "seed_everything")}  # the seed: of windows
        elif not self.fits:
            raise UserError(f"{self.command} needs a trained model: --ckpt_path FILE, or last or best with --run_dir")

        try:
            self.config = parser.parse_args([self.command, "--config", yaml.safe_dump(settings), *self.words])
        except argparse.ArgumentError as error:
            model = settings.get("model", {}).get("class_path", "ModernLM").rpartition(".")[2]
            raise UserError(errors.explain_parse_error(error, self.given, self.command, model)) from error
        config = self.config[self.command]
        self.settings = self.as_settings(config)
        errors.validate_config_values(self.settings, self.given)
        idle = errors.unused_options(self.given, self.settings, self.command)
        if self.saved:
            self.notes += self.changes({key: self.saved["settings"][key] for key in settings}, idle)
        self.notes += idle.values()
        if self.fits:
            self.run_dir, self.resuming = resolve_run_dir(
                places["run_dir"], self.ckpt_path, config.model.class_path.rpartition(".")[2]
            )
        config.ckpt_path = None  # else LightningCLI lets the checkpoint overrule the command line

    def last_given(self, name: str) -> str:
        """--run_dir or --ckpt_path, which decide what else is read."""
        return next((one.value for one in reversed(self.given) if one.name == name and not one.file), "")

    def as_settings(self, config: Any) -> dict[str, Any]:
        """The whole resolved configuration in plain values, without the places."""
        settings = yaml.safe_load(self._parser(self.command).dump(config, skip_none=False))
        return {key: value for key, value in settings.items() if key not in PATH_OPTIONS}

    def changes(self, was: dict[str, Any], idle: Container[str]) -> Iterator[str]:
        """What differs from the checkpoint, a line each, but for what nothing will read.

        Raises:
            InputError: If its weights or its text contradict a setting.
        """
        now, model = self.settings, MODELS[self.settings["model"]["class_path"].rpartition(".")[2]]
        built = was["model"]["class_path"].rpartition(".")[2]
        if built != model.__name__:
            raise UserError(f"--model {model.__name__}: {self.ckpt_path} holds a {built}; leave it out, or train anew")
        fixed = {f"model.{name}" for name in was["model"]["init_args"] if name not in model.mutable_args}
        fixed |= {f"data.{name}" for name in IMMUTABLE_DATA.get(self.command, IMMUTABLE_DATA["validate"])}
        for full_name, before, after in config_diff(was, {key: now[key] for key in was if key in now}):
            name = option_name(full_name)
            if name in fixed:
                raise UserError(f"{name} is {after}, but {self.ckpt_path} has {before}: leave it out, or train anew")
            if name not in idle:
                yield f"{name}: {before} -> {after}"

    def vocab_size(self, data: TextDataModule) -> int:
        if self.saved:
            data.load_state_dict({**self.saved["TextDataModule"], "step": self.saved["global_step"]})
            remembered = self.saved["TextDataModule"]["text_path"]
            if not any(one.name == "data.path" for one in self.given) and Path(remembered).is_file():
                data.path = remembered  # a relative path meant another directory
        if self.fits:
            errors.validate_memory(self.settings, data.vocab_size)
        return data.vocab_size

    # What is built. Nothing is written before all of it is.

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
            self.prepare()
        except CONFIG_ERRORS as error:
            raise UserError(errors.translate_error(error, self.given)) from error
        for note in self.notes:
            rank_zero_print(note)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        init = self.config_init[self.command]
        kwargs |= {"logger": False, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
        kwargs |= {"enable_model_summary": False}
        callbacks, self.io = list(init.trainer.callbacks or []), AtomicCheckpointIO()
        if self.fits:
            self.training = FitRunner(self.run_dir, self.resuming, self.ckpt_path, self.saved, self.settings, init)
            callbacks += self.training.callbacks()
            kwargs |= self.training.trainer_settings()
        else:
            kwargs |= {"enable_checkpointing": False, "enable_progress_bar": False}
        if self.command == "predict":
            callbacks += [PredictionWriter()]
            kwargs |= {"devices": 1, "num_nodes": 1, "strategy": "auto"}  # each would write the same text
        kwargs["plugins"] = [*(init.trainer.plugins or []), self.io]
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def prepare(self) -> None:
        init = self.config_init[self.command]
        if self.command != "predict":
            self.datamodule.read()  # a text that cannot be used is told before anything is said of it
        if self.fits:
            init.ckpt_path = str(self.ckpt_path) if self.saved else None
            return
        self.model.load_state_dict(self.saved["state_dict"])
        if self.command == "test" and self.datamodule.test_frac == 0:
            raise UserError("data.test_frac is 0: there is no test part; give the share of the text to test on")
        if self.command == "predict":
            self.model.sampling = init.sample
            self.datamodule.prompts = read_prompts(init.sample.prompt, init.sample.prompt_file)
            self.validate_prompts(init.sample.prompt_file)

    def validate_prompts(self, file: str) -> None:
        """Refuses characters that the model never saw; says what it will not read."""
        longest = self.datamodule.block_size
        for number, prompt in enumerate(self.datamodule.prompts, 1):
            try:
                length = len(self.datamodule.tokenizer.encode_prompt(prompt))
            except UserError as error:
                where = f"_file {file} line {number}" if file else f" {prompt}"
                raise UserError(f"sample.prompt{where}: {error}") from None
            if length > longest:
                self.notes.append(f"prompt {number} has {length} tokens: the model reads its last {longest}")

    # What is done.

    def fit(self, model: LanguageModel, **kwargs: Any) -> None:
        self.training.run(self.trainer, model, self.datamodule, self.io)
        self.close()

    def close(self) -> None:
        """The end of a run: exit status, a table, and a sample of the best model."""
        if not self.trainer.is_global_zero:
            return
        self.status = {"interrupted": 130, "terminated": 143}.get(self.training.stops.reason or "", 0)
        if self.training.summary.written is None:
            print(f"nothing is left to train: {self.run_dir} has done trainer.max_steps {self.trainer.max_steps}")
            print(f"continue with: {resume_command('completed', self.run_dir)}")
            return
        print(f"\n{format_summary(self.training.summary.written, self.run_dir)}")
        best = self.run_dir / BEST_CKPT
        if self.status == 0 and best.exists():
            self.model.load_state_dict(read_checkpoint(best)["state_dict"])
            text = generate_sample(self.trainer, self.model, "\n", SamplingConfig(max_new_tokens=300))
            print(f"\nwhat best.ckpt writes:\n{text}")

    def validate(self, model: LanguageModel, **kwargs: Any) -> None:
        self.score("val", self.trainer.validate)

    def test(self, model: LanguageModel, **kwargs: Any) -> None:
        self.score("test", self.trainer.test)

    def score(self, part: str, method: Any) -> None:
        if said := self.datamodule.subsampling_note(part):
            rank_zero_print(said)
        method(self.model, datamodule=self.datamodule, verbose=False)
        if self.trainer.is_global_zero:
            for name, value in self.model.eval_metrics.items():
                print(f"{name:20}{value:.7f}")

    def predict(self, model: LanguageModel, **kwargs: Any) -> None:
        self.trainer.predict(model, datamodule=self.datamodule, return_predictions=False)
