"""The command line of fit, validate, test and predict: how defaults, a checkpoint, files and options become one run.

Priority, from low to high: the code, configs/default.yaml, the checkpoint, then files and options in their order.
Commands and exit statuses are in `__main__`, the options in `options`, their mistakes in `errors`, --help in `help`;
how a run trains is in `training`.
"""

import argparse
import re
import warnings
from dataclasses import replace
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from minigpt_pl.checkpoint.io import AtomicCheckpointIO
from minigpt_pl.checkpoint.run_dir import resolve_run_dir
from minigpt_pl.cli import classes, config_files, errors, help, options
from minigpt_pl.cli.environment import apply_environment
from minigpt_pl.cli.export import export_note
from minigpt_pl.cli.final_report import print_report
from minigpt_pl.cli.given_options import config_options, user_options
from minigpt_pl.cli.initial_weights import initial_weights
from minigpt_pl.cli.prompts import PredictConfig, encode_prompts
from minigpt_pl.cli.start import changes, find_start, path_option, read_start
from minigpt_pl.cli.yaml_values import accept_any_path
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.data.sources import find_files
from minigpt_pl.runtime import signals
from minigpt_pl.runtime.errors import UserError, rank_zero_print
from minigpt_pl.runtime.memory import keep_freed_memory
from minigpt_pl.runtime.output import report_of_finished_work
from minigpt_pl.runtime.quiet import silence_libraries
from minigpt_pl.runtime.ranges import Seed
from minigpt_pl.runtime.user_classes import import_path
from minigpt_pl.training import sampling
from minigpt_pl.training.checkpointing import CheckpointConfig
from minigpt_pl.training.compiling import check_compiler
from minigpt_pl.training.distillation import read_teachers
from minigpt_pl.training.fit import FitRunner, as_list
from minigpt_pl.training.lit_modules import MODELS, LanguageModel, ModernLM
from minigpt_pl.training.loggers import WandbConfig
from minigpt_pl.training.refused_callbacks import check_names
from minigpt_pl.training.run_length import EPOCH_OPTIONS, in_steps
from minigpt_pl.training.stopping import ValLossEarlyStopping

CONFIG_ERRORS = (ValueError, TypeError, OSError, ImportError, MisconfigurationException)  # of constructors


def run(command: str, args: list[str]) -> int:
    """Runs fit, validate, test or predict; returns the exit status."""
    silence_libraries()
    keep_freed_memory()
    classes.find_modules_here()
    accept_any_path()
    if help.is_help_request(args):
        print(help.render_help(command, args))
        return 0
    try:
        return MiniGPTCLI(command, args).status
    finally:
        signals.defer(False)
        signals.exit_hooks.clear()


class MiniGPTCLI(LightningCLI):
    """LightningCLI with this project's priority of options, its run directory and its checkpoints.

    Attributes:
        resolved: The whole configuration in plain values, without run_dir and ckpt_path.
        status: The exit status.
    """

    def __init__(self, command: str, args: list[str]):
        self.command, self.fits, self.status = command, command == "fit", 0
        self.args = config_files.resolve_files(args)
        self.user_options = user_options(self.args, command)
        try:
            # Before the parser is built, which takes longer than to find most mistakes.
            self.run_dir_option, start = (
                path_option(name, self.user_options, command) for name in ("run_dir", "ckpt_path")
            )
            self.ckpt_path = find_start(start, self.run_dir_option, command)
            data_class = classes.named_classes(self.user_options).get("data")
            self.checkpoint, self.base = read_start(self.ckpt_path, self.args, self.fits, data_class)
            self.initial = initial_weights(self.user_options, self.args, data_class, self.checkpoint)
            self.base = self.base or self.initial.config
            self.data_class = data_class or classes.data_class(self.base)
            model = MODELS[classes.class_name(self.base)] if self.base else ModernLM
            errors.check_options(self.user_options, command, model, self.data_class or TextDataModule)
            self.args = config_files.for_parser(self.args, command)
            if self.fits:
                self.args, self.user_options = apply_environment(self.args, self.user_options, self.base)
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
                        "exit_on_error": False,  # errors are raised, and main() prints them
                        "allow_abbrev": False,
                        command: {"default_config_files": [options.CONFIGS / "default.yaml"] if self.fits else []},
                    },
                )
        except UserError as error:
            raise errors.name_as_typed(error, self.user_options) from error
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
                remedy = "lower --data.batch_size, --model.block_size or --model.n_embd"
                raise UserError("there is not enough memory", remedy=remedy) from error
            raise

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # one parser, not four
        skipped = super().subcommands()[self.command]
        return {self.command: skipped | {"verbose", "return_predictions", "weights_only"}}

    # Which options there are.

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        seed = None if self.fits else 0  # default.yaml has it; in the other commands only sampling is random
        parser.add_argument("--seed_everything", type=Seed, default=seed)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str, default="")
        # With a default class, None is no part of the type, and errors are short.
        parser.add_subclass_arguments(LanguageModel, "model", default={"class_path": "ModernLM"}, fail_untyped=False)
        self.data_group = classes.add_data_options(parser, self.data_class)
        skipped = options.RESERVED.keys() | (set() if self.fits else options.FIT_ONLY)
        parser.add_class_arguments(Trainer, "trainer", instantiate=False, skip=skipped)
        if self.fits:
            parser.set_defaults({"trainer.check_val_every_n_epoch": None})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data", "model.init_args.vocab_size", self.vocab_size, apply_on="instantiate")
        parser.link_arguments("model.init_args.block_size", f"{self.data_group}.block_size")
        parser.link_arguments("seed_everything", f"{self.data_group}.seed")
        if self.fits:
            parser.add_class_arguments(CheckpointConfig, "checkpoint")
            for name, spec in options.FIT_SPECS.items():
                parser.add_argument(f"--{name}", type=spec.type, default=spec.default)
            parser.add_argument("--early_stopping", type=ValLossEarlyStopping | None)
            parser.add_argument("--samples", type=sampling.SampleCallback | None, default=None)
            parser.add_argument("--wandb", type=WandbConfig | None, default=WandbConfig())
        if self.command == "predict":
            parser.add_class_arguments(PredictConfig, "sample")

    # From the command line to a configuration.

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config, self.resolved = self.parse(parser, self.base)
        errors.check_config(self.resolved)
        self.initial.check(self.resolved)
        if self.resolved.get("wandb"):
            self.resolved["wandb"]["id"] = None  # whoever repeats the options, or forks, starts another run
        unused = errors.unused_options(self.user_options, self.resolved, self.command)
        changed = changes(self.ckpt_path, self.checkpoint, self.base, self.resolved, self.fits)
        self.notes = [line for name, line in changed.items() if name not in unused] + [*unused.values()]
        if self.fits:
            model = classes.class_name(self.resolved)
            self.run_dir, self.resuming = resolve_run_dir(self.run_dir_option, self.ckpt_path, model)

    def parse(self, parser: LightningArgumentParser, base: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The command line on top of a checkpoint's configuration: as the parser's namespace, and in plain values."""
        for option in self.user_options:
            if option.name == "trainer.callbacks":
                check_names(options.as_text(option.value))
        try:
            # Options on the command line are those of the class that it names last, wherever in it that stands.
            flags = classes.named_classes(option for option in self.user_options if not option.file)
            first = [f"--{group}={import_path(cls)}" for group, cls in flags.items()]
            last = [f"--data={import_path(self.data_class)}"] if self.data_class else []
            namespace = parser.parse_args([self.command, "--config", yaml.safe_dump(base), *first, *self.args, *last])
        except argparse.ArgumentError as error:
            errors.check_options(config_options(base, str(self.ckpt_path)), "fit")  # anyone may have written it
            raise errors.explain_parse_error(error, self.user_options) from error
        namespace[self.command].ckpt_path = None  # else LightningCLI lets the checkpoint override the command line
        plain = yaml.safe_load(self._parser(self.command).dump(namespace[self.command], skip_none=False))
        plain = {key: value for key, value in plain.items() if key not in options.PATH_OPTIONS}
        return namespace, classes.flat_data(plain)

    # From a configuration to objects. Nothing is written before all of them are built.

    def vocab_size(self, data: TextDataModule) -> int:
        if self.checkpoint:
            state = self.checkpoint["TextDataModule"]
            data.load_state_dict({**state, "step": self.checkpoint["global_step"]})
            named = any(option.name == "data.path" for option in self.user_options)
            if not named and all(path.is_file() for path in find_files(state["text_path"])):
                data.path = state["text_path"]  # the run's relative path was relative to another directory
        if self.fits:
            errors.check_memory(self.resolved, data.vocab_size)
        return data.vocab_size

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
            self.prepare()
        except CONFIG_ERRORS as error:
            raise errors.as_user_error(error, self.user_options) from error
        rank_zero_print(*self.notes)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        init = self.config_init[self.command]
        kwargs["logger"] = False
        callbacks, self.io = as_list(init.trainer.callbacks), AtomicCheckpointIO()
        if self.fits:
            self.use_steps(init)
            start = (self.ckpt_path, self.checkpoint)
            self.training = FitRunner(self.run_dir, self.resuming, *start, self.resolved, init, self.initial.parent)
            callbacks = self.training.callbacks(callbacks)
            kwargs |= self.training.trainer_options()
        else:
            kwargs |= {"enable_checkpointing": False, "enable_progress_bar": False}
        if self.command == "predict":
            callbacks += [sampling.PredictionWriter()]
            kwargs |= {"devices": 1, "num_nodes": 1, "strategy": "auto"}  # each device would write the same text
        kwargs["plugins"] = [*(init.trainer.plugins or []), self.io]
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def use_steps(self, init: Any) -> None:
        """Turns epochs and batches, as the Trainer counts, into the steps that config.yaml then holds."""
        given = any(o.name == "trainer.max_steps" for o in self.user_options) or bool(self.checkpoint)
        found = in_steps(self.resolved["trainer"], init.data, init.trainer.max_steps if given else None)
        if found:
            given_names = ", ".join(f"{k} {v}" for k in EPOCH_OPTIONS if (v := self.resolved["trainer"][k]) is not None)
            self.notes.append(f"{given_names}: {', '.join(f'{name} is {value}' for name, value in found.items())}")
        for name in EPOCH_OPTIONS:
            init.trainer[name] = self.resolved["trainer"][name] = None
        if "max_steps" in found:
            init.trainer.max_steps = self.resolved["trainer"]["max_steps"] = found["max_steps"]
        if "eval_every" in found:
            self.resolved["data"]["eval_every"] = found["eval_every"]
            init.data.config = replace(init.data.config, eval_every=found["eval_every"])

    def prepare(self) -> None:
        init = self.config_init[self.command]
        if self.command != "predict":
            self.datamodule.read()  # an unusable text is reported before anything else is printed
        if self.model.config.compile:
            check_compiler(self.trainer.strategy.root_device)
        if self.fits:
            init.ckpt_path = str(self.ckpt_path) if self.checkpoint else None
            self.notes += self.initial.copy_into(self.model, self.datamodule)
            read_teachers(self.trainer, self.model, self.datamodule)
            return
        self.model.load_state_dict(self.checkpoint["state_dict"])
        if self.command == "test" and self.datamodule.config.test_frac == 0:
            remedy = "set the share of the text to test on"
            raise UserError("the text has no test split", option="data.test_frac", value=0, remedy=remedy)
        if self.command == "predict":
            data, self.model.sampling = self.datamodule, init.sample
            data.prompts = encode_prompts(init.sample, data.tokenizer)
            for number, length in enumerate(map(len, data.prompts), 1):
                if length > (limit := data.config.block_size):
                    self.notes.append(f"prompt {number} has {length} tokens: the model reads the last {limit}")

    # The commands.

    def fit(self, model: LanguageModel, **kwargs: Any) -> None:
        trainer: Any = self.trainer
        if trainer.fast_dev_run:
            trainer.fit(model, datamodule=self.datamodule)
            print(f"fast_dev_run: {self.trainer.global_step} steps and an evaluation ran, and nothing was written")
        else:
            note = "" if self.checkpoint else export_note(model.net)  # with a checkpoint it is too late
            self.training.run(self.trainer, model, self.datamodule, self.io, note)
            self.close()

    def close(self) -> None:
        """The end of a run: the exit status, and a report."""
        if not self.trainer.is_global_zero:
            return
        self.status = {"interrupted": 130, "terminated": 143}.get(self.training.stops.reason or "", 0)
        with report_of_finished_work():
            summary = self.training.summary.written
            print_report(self.trainer, self.model, summary, self.run_dir, self.resolved, self.status == 0)

    def validate(self, model: LanguageModel, **kwargs: Any) -> None:
        self.evaluate("val", self.trainer.validate)

    def test(self, model: LanguageModel, **kwargs: Any) -> None:
        self.evaluate("test", self.trainer.test)

    def evaluate(self, split: str, method: Any) -> None:
        rank_zero_print(self.datamodule.subsampling_note(split))
        method(self.model, datamodule=self.datamodule, verbose=False)
        if self.trainer.is_global_zero:
            for name, value in self.model.eval_metrics.items():
                print(f"{name:19} {value:.7f}")

    def predict(self, model: LanguageModel, **kwargs: Any) -> None:
        self.trainer.predict(model, datamodule=self.datamodule, return_predictions=False)
