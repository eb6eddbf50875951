"""A study file, and the runs that it plans: each configuration with each of its seeds, and how far each of them is.

How they are run is in `study`, what a run leaves in `results`.
"""

import json
import os
import shlex
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml

from minigpt_pl.checkpoint.io import LAST_CKPT
from minigpt_pl.cli.app import MiniGPTCLI
from minigpt_pl.cli.options import CONFIGS, resolve_config_names, user_options
from minigpt_pl.data.corpus import TextStats, read_stats
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.data.token_cache import cache_dir
from minigpt_pl.experiments import results
from minigpt_pl.experiments.statistics import MAX_COMPARISONS, MIN_SEEDS_COMPARISON
from minigpt_pl.runtime.atomic_io import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, atomic_write
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.training.summary import NORMAL_STOPS

DEFAULT_FIRST_SEED, DEFAULT_SEEDS = 1337, 5
STUDY_FILE, BASELINES_FILE, FAILED_FILE = "study.yaml", "baselines.json", "failed.json"
RESERVED_OPTIONS = ("run_dir", "ckpt_path", "seed_everything")


@dataclass(frozen=True)
class Variant:
    """A line of a study file's `runs`: what `fit` is given, and the first of its seeds."""

    words: list[str]
    first_seed: int = DEFAULT_FIRST_SEED


@dataclass(frozen=True)
class Study:
    """A study file.

    Args:
        name: The file's name.
        content: As it stands there.
        configurations: By their names.
        comparisons: Pairs of names, of which the second is taken from the first; named before anything runs.
        seeds: Of each configuration, or None: enough for a comparison where it takes part in one.
    """

    name: str
    content: dict[str, Any]
    configurations: dict[str, Variant]
    comparisons: list[tuple[str, str]]
    seeds: int | None

    def seeds_of(self, name: str) -> int:
        is_compared = any(name in pair for pair in self.comparisons)
        return self.seeds or (MIN_SEEDS_COMPARISON if is_compared else DEFAULT_SEEDS)


def find_study(said: str) -> Path:
    """The file, or the shipped one of that name."""
    shipped = CONFIGS / "studies"
    for path in (Path(said), shipped / said, shipped / f"{said}.yaml"):
        if path.is_file():
            return path
    known = sorted(path.stem for path in shipped.glob("*.yaml"))
    near = get_close_matches(said, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"shipped are {', '.join(known)}"
    raise UserError(f"study {said}: there is no such file; {hint}")


def read_study(path: Path) -> Study:
    """Reads a study file.

    Raises:
        InputError: If it is no study.
    """

    def refuse(problem: str) -> NoReturn:
        raise UserError(f"study {path}: {problem}")

    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        refuse(f"it cannot be read as YAML ({getattr(error, 'problem', None) or error})")
    if not isinstance(content, dict) or not isinstance(content.get("runs"), dict) or not content["runs"]:
        refuse("it needs runs: a name and the options of fit for each, such as  wide: -c moe --model.n_embd 256")
    if unknown := content.keys() - {"description", "base_args", "seeds", "runs", "comparisons"}:
        refuse(
            f"{', '.join(sorted(map(str, unknown)))}: it may hold description, base_args, seeds, runs and comparisons"
        )
    seeds = content.get("seeds")
    if seeds is not None and not (isinstance(seeds, int) and seeds >= 1):
        refuse(f"seeds is {seeds}: it must be at least 1")
    configurations = {}
    for name, line in content["runs"].items():
        line = {"fit": line} if isinstance(line, str | None) else line
        if not isinstance(name, str) or not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
            refuse(f"runs: {name} is no name: give letters, digits, - and _")
        if not isinstance(line, dict) or line.keys() - {"fit", "first_seed"}:
            refuse(f"runs: {name}: give the options of fit, or fit: and first_seed:")
        first, options = (
            line.get("first_seed", DEFAULT_FIRST_SEED),
            f"{content.get('base_args') or ''} {line.get('fit') or ''}",
        )
        if not isinstance(first, int) or not 0 <= first < 2**31:
            refuse(f"runs: {name}: first_seed is {first}: it must be a number from 0 on, below 2^31")
        try:
            configurations[name] = Variant(shlex.split(options), first)
        except ValueError as error:
            refuse(f"runs: {name}: {options.strip()} cannot be cut into words ({error})")
    comparisons, named = [], content.get("comparisons") or []
    if not isinstance(named, list):
        refuse(f"comparisons is {named}: it must be a list, such as  - wide - narrow")
    for said in named:
        pair = tuple(str(said).split(" - "))
        if len(pair) != 2 or not set(pair) <= configurations.keys():
            refuse(f"comparisons: {said}: write the names of two runs, such as {' - '.join(list(configurations)[:2])}")
        comparisons.append((pair[0], pair[1]))
    if len(comparisons) > MAX_COMPARISONS:
        refuse(f"{len(comparisons)} comparisons are named, and more than {MAX_COMPARISONS} could find nothing")
    return Study(path.stem, content, configurations, comparisons, seeds)


class DryRunCLI(MiniGPTCLI):
    """The settings of a fit, of which nothing is built."""

    def instantiate_classes(self) -> None:
        raise _Resolved(self.settings)


class _Resolved(Exception):
    pass


def resolve_config(words: list[str]) -> dict[str, Any]:
    """The whole configuration that `fit` would have with these words.

    Raises:
        InputError: If it would refuse them, or they say what a study decides.
    """
    for one in user_options(resolve_config_names(words)):
        if one.name in RESERVED_OPTIONS and not one.file:
            raise UserError(f"{one}: a study decides it; leave it out")
    before = dict(os.environ)
    try:
        DryRunCLI("fit", words)
    except _Resolved as found:
        settings: dict[str, Any] = found.args[0]
        return settings
    finally:  # what a run tells its other processes is not for the runs of a study
        os.environ.clear()
        os.environ.update(before)
    raise AssertionError("a plan was carried out")


def stats_of_text(settings: dict[str, Any]) -> TextStats:
    """The text that a configuration reads."""
    data = TextDataModule(settings["data"]["path"], 1, 1, 1)
    return read_stats(data.resolve_path(), cache_dir())


@dataclass
class Run:
    """One configuration with one seed.

    Args:
        name: Of the configuration.
        seed: Of the run.
        words: What `fit` is given.
        settings: What these resolve to.
        data_sha256: Of its text.
        run_dir: Where it trains.
        folder: Where its results go.
    """

    name: str
    seed: int
    words: list[str]
    settings: dict[str, Any]
    data_sha256: str
    run_dir: Path
    folder: Path

    def __str__(self) -> str:
        return self.folder.name

    def is_done(self) -> bool:
        """Whether its results are there.

        Raises:
            InputError: If the results, or the run directory, are those of another run.
        """
        done = (self.folder / SUMMARY_FILE).is_file()
        if done:
            found = results.Result(self.folder)
            problems = list(results.run_differences(found.settings, results.strip_paths(self.settings)))
            if found.summary["data_sha256"] != self.data_sha256:
                problems.append("it is another text")
            if problems:
                remedy = "name this run otherwise, or remove that folder"
                raise UserError(f"{self.folder} holds results of other settings ({'; '.join(problems)}): {remedy}")
        elif (config := self.run_dir / CONFIG_FILE).is_file():
            was = yaml.safe_load(config.read_text("utf-8"))
            if problems := list(results.run_differences(was, self.settings)):
                remedy = "give another --run_dir, or remove that one"
                raise UserError(f"{self.run_dir} holds a run of other settings ({'; '.join(problems)}): {remedy}")
        return done

    def has_ended(self) -> bool:
        """Whether nothing is left to train, though its results may not be written."""
        try:
            summary = json.loads((self.run_dir / SUMMARY_FILE).read_text("utf-8"))
        except (OSError, ValueError):
            return False
        return summary["stop_reason"] in NORMAL_STOPS

    def command(self) -> list[str]:
        """The options of the `fit` that begins it, or goes on with it."""
        if (self.run_dir / LAST_CKPT).is_file():
            return ["--run_dir", str(self.run_dir), "--ckpt_path", "last"]
        group = f"{self.folder.parents[1].name}/{self.name}"
        wandb = [] if self.settings["wandb"] is None else ["--wandb.group", group, "--wandb.job_type", "study"]
        return [*self.words, "--seed_everything", str(self.seed), *wandb, "--run_dir", str(self.run_dir)]

    @property
    def max_steps(self) -> int:
        steps: int = self.settings["trainer"]["max_steps"]
        return steps

    def steps(self) -> int:
        """Steps done so far, by its figures."""
        with suppress(OSError, ValueError):
            return int((self.run_dir / METRICS_FILE).read_bytes().rsplit(b"\n", 2)[-2].split(b",")[0])
        return 0


def plan(study: Study, out: Path, run_dir: Path, seeds: int | None, only: list[str]) -> list[Run]:
    """The runs of a study, first seeds first.

    Args:
        study: The study.
        out: Its results folder.
        run_dir: Where its runs train.
        seeds: Of each configuration, in place of what the study says.
        only: The configurations to run; all if there are none.
    """
    if unknown := set(only) - study.configurations.keys():
        raise UserError(f"--only {' '.join(sorted(unknown))}: the study has {', '.join(study.configurations)}")
    runs = []
    for name in dict.fromkeys(only) or study.configurations:
        configuration = study.configurations[name]
        try:
            settings = resolve_config(configuration.words)
            sha256 = stats_of_text(settings).sha256
        except UserError as error:
            raise UserError(f"run {name}: {error}") from error
        for place in range(seeds or study.seeds_of(name)):
            seed = configuration.first_seed + place
            label = f"{name}-{seed}"
            own = settings | {"seed_everything": seed}
            runs.append(
                (place, Run(name, seed, configuration.words, own, sha256, run_dir / label, out / "runs" / label))
            )
    return [run for _, run in sorted(runs, key=lambda one: one[0])]


def save_study(study: Study, out: Path) -> None:
    """Leaves the study beside its results: its comparisons were named before.

    Raises:
        InputError: If results are there that were begun under other comparisons.
    """
    path = out / STUDY_FILE
    if path.is_file() and any(out.glob("runs/*")):
        was = read_study(path).comparisons
        if was != study.comparisons:
            named = "; ".join(" - ".join(pair) for pair in was) or "none"
            raise UserError(f"{path} named other comparisons before anything ran ({named}): give another --out")
    out.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(study.content, sort_keys=False, allow_unicode=True, width=110)
    atomic_write(path, results.strip_paths_in_text(text).encode())
