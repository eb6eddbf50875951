"""The study file and its plan: every variant with each of its seeds, and the state of each planned run.

`runner` executes the runs, `results` stores what they leave.
"""

import json
import re
import shlex
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, NoReturn

import yaml

from minigpt_pl.checkpoint.io import LAST_CKPT
from minigpt_pl.cli.app import MiniGPTCLI
from minigpt_pl.cli.config_files import resolve_files
from minigpt_pl.cli.given_options import user_options
from minigpt_pl.cli.options import CONFIGS
from minigpt_pl.experiments.results import RUNS_FILE, Result, datamodule_of, run_differences, strip_paths
from minigpt_pl.experiments.statistics import MAX_COMPARISONS, MIN_SEEDS_COMPARISON
from minigpt_pl.runtime.atomic_io import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, atomic_write
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.runtime.user_classes import user_class_args
from minigpt_pl.training.summary import NORMAL_STOPS

DEFAULT_FIRST_SEED, DEFAULT_SEEDS = 1337, 5
STUDY_FILE, BASELINES_FILE, FAILED_FILE = "study.yaml", "baselines.json", "failed.json"
STUDY_KEYS = ("description", "base_args", "seeds", "runs", "comparisons")
RESERVED_OPTIONS = ("run_dir", "ckpt_path", "seed_everything")


@dataclass(frozen=True)
class Variant:
    """An entry of a study file's `runs`."""

    args: list[str]  # of `fit`
    first_seed: int
    seeds: int | None  # None for those of the study


@dataclass(frozen=True)
class Study:
    """A study file: its name and content, and what they mean."""

    name: str
    content: dict[str, Any]
    variants: dict[str, Variant]
    comparisons: list[tuple[str, str]]  # the first minus the second of each pair
    seeds: int | None  # of each variant that has no number of its own; None for the default

    def seeds_of(self, name: str) -> int:
        is_compared = any(name in pair for pair in self.comparisons)
        return self.variants[name].seeds or self.seeds or (MIN_SEEDS_COMPARISON if is_compared else DEFAULT_SEEDS)


def find_study(name: str) -> Path:
    """The study file of that path, or the shipped study of that name."""
    shipped = CONFIGS / "studies"
    for path in (Path(name), shipped / name, shipped / f"{name}.yaml"):
        if path.is_file():
            return path
    known = sorted(path.stem for path in shipped.glob("*.yaml"))
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the shipped studies are {', '.join(known)}"
    raise UserError(f"study {name}: the file does not exist; {hint}")


def read_study(path: Path) -> Study:
    """Reads a study file; UserError if it is not a study."""

    def refuse(problem: str) -> NoReturn:
        raise UserError(f"study {path}: {problem}")

    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        refuse(f"it cannot be read as YAML ({getattr(error, 'problem', None) or error})")
    if not isinstance(content, dict) or not isinstance(content.get("runs"), dict) or not content["runs"]:
        refuse("it needs runs: a name and the options of fit for each, such as  wide: -c moe --model.n_embd 256")
    if unknown := content.keys() - set(STUDY_KEYS):
        refuse(f"the key {min(map(str, unknown))} is unknown; the keys are {', '.join(STUDY_KEYS)}")

    def seeds_in(entry: dict[str, Any], place: str = "") -> int | None:
        seeds = entry.get("seeds")
        if seeds is not None and not (isinstance(seeds, int) and seeds >= 1):
            refuse(f"{place}seeds is {seeds}: it must be at least 1")
        return seeds

    variants = {}
    for name, entry in content["runs"].items():
        entry = {"fit": entry} if isinstance(entry, str | None) else entry
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", str(name)):
            refuse(f"runs: {name} is not a valid name: use letters, digits, - and _")
        if not isinstance(entry, dict) or entry.keys() - {"fit", "first_seed", "seeds"}:
            refuse(f"runs: {name}: give the options of fit, or fit:, first_seed: and seeds:")
        first = entry.get("first_seed", DEFAULT_FIRST_SEED)
        if not isinstance(first, int) or not 0 <= first < 2**31:
            refuse(f"runs: {name}: first_seed is {first}: it must be an integer of at least 0 and below 2^31")
        options = f"{content.get('base_args') or ''} {entry.get('fit') or ''}"
        try:
            variants[str(name)] = Variant(shlex.split(options), first, seeds_in(entry, f"runs: {name}: "))
        except ValueError as error:
            refuse(f"runs: {name}: {options.strip()} cannot be split into arguments ({error})")
    comparisons, entries = [], content.get("comparisons") or []
    if not isinstance(entries, list):
        refuse(f"comparisons is {entries}: it must be a list, such as  - wide - narrow")
    for entry in entries:
        first, _, second = str(entry).partition(" - ")
        if not {first, second} <= variants.keys():
            refuse(f"comparisons: {entry}: write the names of two runs, such as {' - '.join(list(variants)[:2])}")
        comparisons.append((first, second))
    if len(comparisons) > MAX_COMPARISONS:
        refuse(f"it names {len(comparisons)} comparisons: with more than {MAX_COMPARISONS} nothing can be found")
    return Study(path.stem, content, variants, comparisons, seeds_in(content))


class _Resolved(Exception):
    """Leaves LightningCLI with a configuration, before anything is built."""


class DryRunCLI(MiniGPTCLI):
    def instantiate_classes(self) -> None:
        raise _Resolved(self.resolved)


def resolve_config(args: list[str]) -> dict[str, Any]:
    """The whole configuration of `fit` with these arguments; UserError if `fit`, or a study, refuses one of them."""
    for option in user_options(resolve_files(args), "fit"):
        if option.name in RESERVED_OPTIONS and not option.file:
            raise UserError(f"{option}: the study decides it", remedy="remove the option")
    try:
        DryRunCLI("fit", args)
    except _Resolved as resolved:
        config: dict[str, Any] = resolved.args[0]
        return config
    raise AssertionError("a dry run started a fit")


@dataclass(frozen=True, eq=False)
class Run:
    """A variant with one seed: arguments of `fit`, and the configuration that they resolve to."""

    name: str  # of the variant
    seed: int
    args: list[str]
    config: dict[str, Any]
    data_sha256: str
    run_dir: Path
    group: str  # in W&B
    uses: tuple[str, ...] = ()  # names of other planned runs, whose directories its arguments name

    def __str__(self) -> str:
        return f"{self.name}-{self.seed}"

    def check(self, result: Result | None) -> None:
        """Raises UserError if the stored result, or else the run directory, is of another configuration or text."""
        path, problems = self.run_dir / CONFIG_FILE, list[str]()
        if result:
            problems += run_differences(result.config, self.config)
            problems += ["the text differs"] if result.summary["data_sha256"] != self.data_sha256 else []
        elif path.is_file():
            problems += run_differences(yaml.safe_load(path.read_text("utf-8")), self.config)
        if problems:
            problem = f"{'the results hold' if result else f'{self.run_dir} holds'} {self} with another configuration"
            remedy = "use another name for the run, another --out or another --run_dir"
            raise UserError(f"{problem} ({'; '.join(problems)})", remedy=remedy)

    def has_ended(self) -> bool:
        """Whether the training is complete. Its results may not be stored yet."""
        with suppress(OSError, ValueError):
            summary = json.loads((self.run_dir / SUMMARY_FILE).read_text("utf-8"))
            return summary["stop_reason"] in NORMAL_STOPS
        return False

    @property
    def can_resume(self) -> bool:
        return (self.run_dir / LAST_CKPT).is_file()

    def fit_args(self) -> list[str]:
        """The arguments of the `fit` that starts or resumes the run."""
        if self.can_resume:
            return ["--run_dir", str(self.run_dir), "--ckpt_path", "last", *user_class_args(self.config)]
        wandb = ["--wandb.group", self.group, "--wandb.job_type", "study"] if self.config["wandb"] else []
        return [*self.args, "--seed_everything", str(self.seed), *wandb, "--run_dir", str(self.run_dir)]

    def steps(self) -> int:
        """Steps done so far, as logged in metrics.csv."""
        with suppress(OSError, ValueError, IndexError):
            return int((self.run_dir / METRICS_FILE).read_bytes().rsplit(b"\n", 2)[-2].split(b",")[0])
        return 0


def for_seed(args: list[str], seed: int) -> list[str]:
    """Arguments of a run: {seed} is its seed, {seed+1000} that of another run, such as a teacher's."""
    return [re.sub(r"\{seed(?:\+(\d+))?\}", lambda found: str(seed + int(found[1] or 0)), arg) for arg in args]


def used_runs(run: Run, planned: list[Run]) -> tuple[str, ...]:
    """Names of those planned runs whose directories stand in the arguments of a run."""
    paths = re.findall(r"[\w./~-]+", " ".join(run.args))
    return tuple(str(one) for one in planned if any(Path(path).is_relative_to(one.run_dir) for path in paths))


def plan(study: Study, out: Path, run_dir: Path, seeds: int | None, only: list[str]) -> list[Run]:
    """The runs of a study, or of `only` some of its variants; all first seeds come before the second ones."""
    if unknown := set(only) - study.variants.keys():
        raise UserError(f"--only {' '.join(sorted(unknown))}: the study has {', '.join(study.variants)}")
    runs = []
    for name in dict.fromkeys(only) or study.variants:
        variant = study.variants[name]
        try:
            first = for_seed(variant.args, variant.first_seed)
            config = resolve_config(first)
            sha256 = datamodule_of(config).text_stats.sha256
        except UserError as error:
            raise UserError(f"run {name}: {error}") from error
        for index in range(seeds or study.seeds_of(name)):
            seed, group = variant.first_seed + index, f"{out.name}/{name}"
            args = for_seed(variant.args, seed)
            own = (config if args == first else resolve_config(args)) | {"seed_everything": seed}
            runs.append((index, Run(name, seed, args, own, sha256, run_dir / f"{name}-{seed}", group)))
    planned = [run for _, run in sorted(runs, key=lambda item: item[0])]
    linked = [replace(run, uses=used_runs(run, planned)) for run in planned]
    try:
        TopologicalSorter({str(run): run.uses for run in linked}).prepare()
    except CycleError as error:
        raise UserError(f"the runs {', '.join(sorted(set(error.args[1])))} wait for each other") from None
    return linked


def save_study(study: Study, out: Path) -> None:
    """Copies the study file to its results. Its comparisons must be those that it named before the first result."""
    path = out / STUDY_FILE
    before = read_study(path).comparisons if path.is_file() and (out / RUNS_FILE).is_file() else study.comparisons
    if before != study.comparisons:
        problem = f"{path} named other comparisons before anything ran ({'; '.join(map(' - '.join, before)) or 'none'})"
        raise UserError(problem, remedy="keep these comparisons, or give another --out")
    out.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(study.content, sort_keys=False, allow_unicode=True, width=110)
    atomic_write(path, strip_paths(text).encode())
