"""The pages in docs/ keep their word: commands run, or at least parse; links lead somewhere; no option is missing.

`python tests/test_docs.py` writes docs/configuration.md anew.
"""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import PROJECT, Outcome
from learning_curve import PICTURE, draw

from minigpt_pl.checkpoint.run_dir import resolve_run_dir
from minigpt_pl.cli.help import METAVARS, metavar
from minigpt_pl.cli.options import CONFIGS, OptionSpec, flatten, option_name, option_specs
from minigpt_pl.data.baselines import compute_baselines
from minigpt_pl.runtime.errors import UserError, is_rank_zero

PAGES = sorted(PROJECT.glob("docs/*.md"))
CONFIGURATION = PROJECT / "docs" / "configuration.md"
COMMANDS = ("fit", "validate", "test", "predict")
OTHERS = {  # programs that are not ours; each line of theirs is looked at by hand, or by a test of its own
    "wandb": {"login", "sync", "sweep", "agent"},
    "torchrun": {"--nproc-per-node", "--nnodes"},
    "srun": {"python"},
    "sbatch": {"train.sh"},
    "pip": {"install"},
}


def commands(page: Path) -> list[str]:
    """The lines of the bash blocks of a page, those that end in a backslash joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]


EVERY = [(page, command) for page in PAGES for command in commands(page)]


def of_minigpt(command: str) -> list[str]:
    """The words for `minigpt` in a command, with which others may stand before and after them; [] if there are none."""
    words = shlex.split(command, comments=True)
    if words and words[0] == "minigpt":
        return words[1:]
    return words[words.index("main.py") + 1 :] if "main.py" in words else []


def parsed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a command line read up to where the first thing would be built.

    Raises:
        InputError: If it would be refused.
    """
    from minigpt_pl.cli.app import MiniGPTCLI

    class Parsed(Exception):
        pass

    def stop(self: MiniGPTCLI) -> None:
        raise Parsed

    monkeypatch.setattr(MiniGPTCLI, "instantiate_classes", stop)
    with pytest.raises(Parsed):
        MiniGPTCLI(words[0], words[1:])


@pytest.mark.parametrize(("page", "command"), EVERY, ids=[f"{page.stem}: {command}" for page, command in EVERY])
def test_a_command_parses(page: Path, command: str, monkeypatch: pytest.MonkeyPatch, trained: Path) -> None:
    monkeypatch.chdir(trained)
    words = of_minigpt(command)
    if words and words[0] in COMMANDS:
        words = [str(trained / "run" / Path(word).name) if word.endswith(".ckpt") else word for word in words]
        if "--ckpt_path" in words and "--run_dir" in words:
            words[words.index("--run_dir") + 1] = str(trained / "run")
        parsed(words, monkeypatch)
    elif not words:
        first, *rest = shlex.split(command)
        if (first, *rest[:2]) == ("python", "-m", "pytest"):
            rest = [word for word in rest if word.startswith("tests/")]
            assert all((PROJECT / word).exists() for word in rest)
        elif first == "python":
            assert (PROJECT / rest[0]).is_file(), command
        else:
            assert any(word.split("=")[0] in OTHERS[first] for word in rest), command


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run in it, and a text."""
    from minigpt_pl.__main__ import main

    folder = tmp_path_factory.mktemp("docs")
    (folder / "my.txt").write_text("the sea comes in, the sea goes out.\n" * 200, "utf-8")
    words = (
        "-c",
        "smoke",
        "--wandb",
        "null",
        "--samples",
        "null",
        "--trainer.max_steps",
        "4",
        "--data.eval_every",
        "4",
        "--model.conv_kernel_size",
        "0",
    )
    assert main(["fit", *words, "--data.path", str(folder / "my.txt"), "--run_dir", str(folder / "run")]) == 0
    return folder


def test_export_and_floors_run(minigpt: Callable[..., Outcome], trained: Path, tmp_path: Path) -> None:
    """Those of the commands that build nothing of the command line's own."""
    for _, command in EVERY:
        words = of_minigpt(command)
        if not words or words[0] in (*COMMANDS, "doctor", "study", "report"):
            continue
        if words[0] == "export":
            words[words.index("--ckpt_path") + 1] = str(trained / "run" / "best.ckpt")
            words[words.index("--out") + 1] = str(tmp_path / f"out{len(list(tmp_path.iterdir()))}")
        elif "--data.path" in words:
            words[words.index("--data.path") + 1] = str(trained / "my.txt")
        done = minigpt(*words)
        assert done.status == 0, f"{command}: {done.err}"


def test_studies_of_a_page_can_be_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minigpt_pl.experiments.runner import parser_of
    from minigpt_pl.experiments.spec import STUDY_FILE, find_study, plan, read_study

    monkeypatch.chdir(tmp_path)
    page = (PROJECT / "docs" / "study.md").read_text("utf-8")
    (example,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    Path("wide.yaml").write_text(example, "utf-8")
    for command, *words in filter(None, (of_minigpt(line) for _, line in EVERY)):
        if command == "study":
            said = parser_of("study").parse_args(words)
            study = read_study(find_study(said.file))
            assert plan(study, Path("out"), Path("runs"), said.seeds, said.only)
        elif command == "report":
            assert (PROJECT / words[0] / STUDY_FILE).is_file(), words


def test_the_sweep_calls_our_command_line(
    monkeypatch: pytest.MonkeyPatch, minigpt: Callable[..., Outcome], trained: Path, tmp_path: Path
) -> None:
    """Its command as the agent would fill it in, --NAME=VALUE for each parameter: run, but offline and small."""
    import wandb

    from minigpt_pl.checkpoint.io import read_checkpoint
    from minigpt_pl.training.summary import RunSummary

    sweep = yaml.safe_load((PROJECT / "docs" / "wandb-sweep.yaml").read_text("utf-8"))
    arguments = [f"--{name}={found['values'][0]}" for name, found in sweep["parameters"].items()]
    filled = {"${env}": [], "${interpreter}": ["python"], "${args}": arguments}
    words = [word for part in sweep["command"] for word in filled.get(part, [part])]
    assert words[:2] == ["python", "main.py"]
    assert sweep["metric"]["name"] in RunSummary({}, None, None).best
    assert minigpt(*words[2:], "--model.lrr=1").status == 2

    wandb.setup()  # before it learns of a sweep, which the tests after this one have no part in
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    small = ("-c", "smoke", "--data.path", trained / "my.txt", "--samples", "null", "--wandb.offline=true")
    done = minigpt(*words[2:], *small, "--run_dir", tmp_path / "run")
    assert done.status == 0, done.err
    assert list(tmp_path.glob("run/wandb/offline-run-*-chosen"))
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["wandb_id"] == "chosen"


@pytest.mark.parametrize("page", [*PAGES, PROJECT / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def rows(text: str) -> dict[str, list[str]]:
    """The cells of the tables in a page, by the name in backticks that stands first in a row."""
    found: dict[str, list[str]] = {}
    for name, rest in re.findall(r"^\| `([^`]+)` \|(.*)\|$", text, re.MULTILINE):
        found.setdefault(name, []).extend(rest.split("|"))
    return found


def rounded(text: str, digits: int) -> set[str]:
    return {f"{float(number):.{digits}f}" for number in re.findall(r"-?\d+\.\d+", text)}


def test_figures_that_a_page_quotes_of_a_study_are_its_own() -> None:
    """A row belongs to the study that the page has last linked to before it."""
    quoted = 0
    for page in [*PAGES, PROJECT / "README.md"]:
        _, *parts = re.split(r"\]\(([^)#\s]*results/\w+/index\.md)\)", page.read_text("utf-8"))
        for target, text in zip(parts[::2], parts[1::2], strict=True):
            study = rows((page.parent / target).read_text("utf-8"))
            for name, cells in rows(text).items():
                for number in re.findall(r"-?\d+\.\d+", " ".join(cells)) if name in study else ():
                    known = rounded(" ".join(study[name]), len(number.split(".")[1]))
                    assert number in known, f"{page.name}: {name}: {number} is not in {target}"
                    quoted += 1
    assert quoted


def test_tests_that_a_page_names_exist() -> None:
    sources = {path.name: path.read_text("utf-8") for path in PROJECT.glob("tests/*.py")}
    for page in PAGES:
        for name in re.findall(r"`(test_\w+)`", page.read_text("utf-8")):
            assert any(f"def {name}(" in source for source in sources.values()), f"{page.name}: {name}"
        for file in re.findall(r"`tests/(\w+\.py)`", page.read_text("utf-8")):
            assert file in sources, f"{page.name}: {file}"


@pytest.mark.parametrize("name", ["LOCAL_RANK", "RANK", "SLURM_PROCID", "NODE_RANK"])
def test_of_processes_started_side_by_side_one_is_the_first(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun, SLURM and Lightning on a second node each say in their own variable which process this is."""
    for other in ("LOCAL_RANK", "RANK", "SLURM_PROCID", "NODE_RANK", "MINIGPT_RUN_DIR", "MINIGPT_RESUMING"):
        monkeypatch.delenv(other, raising=False)
    assert is_rank_zero()
    monkeypatch.setenv(name, "1")
    assert not is_rank_zero()
    assert resolve_run_dir("runs/x", None, "ModernLM") == (Path("runs/x"), False)
    with pytest.raises(UserError, match="give --run_dir"):
        resolve_run_dir("", None, "ModernLM")


@pytest.mark.parametrize(("mark", "count"), [("TORCHELASTIC_RUN_ID", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")])
def test_the_first_of_several_says_that_they_need_a_place(
    mark: str, count: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only it speaks; did it wait for the others, which have ended, nobody would say why."""
    monkeypatch.delenv("MINIGPT_RUN_DIR", raising=False)
    monkeypatch.setenv(mark, "0")
    monkeypatch.setenv(count, "2")
    assert is_rank_zero()
    with pytest.raises(UserError, match="give --run_dir"):
        resolve_run_dir("", None, "ModernLM")
    assert resolve_run_dir("runs/x", None, "ModernLM") == (Path("runs/x"), False)
    monkeypatch.setenv(count, "1")
    assert resolve_run_dir("", None, "ModernLM")[0].parent == Path("runs")


def labels(picture: Path) -> set[str]:
    """What stands beside the lines of a learning curve, such as `bigram 2.334`."""
    return set(re.findall(r">(\S+ (?:model )?\d\.\d{3})</text>", picture.read_text("utf-8")))


def expected_labels(text: str, best: float) -> set[str]:
    values = {name: figures["nats_per_char"] for name, figures in compute_baselines(text).items()} | {
        "this model": best
    }
    return {f"{name} {value:.3f}" for name, value in values.items()}


def test_the_curve_is_that_of_the_run_that_readme_shows() -> None:
    readme = (PROJECT / "README.md").read_text("utf-8")
    best = float(re.findall(r"^\| `val/nats_per_char` .* (\d\.\d+) \|$", readme, re.MULTILINE)[0])
    assert f"{best:.3f}" == f"{float(re.findall(r'best val/loss (.*?) ', readme)[0]):.3f}"
    assert labels(PICTURE) == expected_labels("data/input.txt", best)


def test_a_run_is_drawn_beside_the_floors_of_its_text(trained: Path, tmp_path: Path) -> None:
    draw(trained / "run", tmp_path / "curve.svg")
    best = json.loads((trained / "run" / "summary.json").read_text("utf-8"))["best_nats_per_char"]
    assert labels(tmp_path / "curve.svg") == expected_labels(str(trained / "my.txt"), best)


def test_readme_leads_to_every_page() -> None:
    readme = (PROJECT / "README.md").read_text("utf-8")
    for page in [*PAGES, *PROJECT.glob("docs/*.svg")]:
        assert f"(docs/{page.name})" in readme, page.name


HEAD = """# Every option

An option stands on the command line with two dashes, or in a file for `-c` with its dots as levels; both count in
their order, the last one wins. Weaker are the checkpoint, then `configs/default.yaml`, then the code. Defaults are
those of a `fit` without files; a dash means that there is none, or that it follows from something else. `--run_dir`,
`--ckpt_path`, `--config` and `--print_config` are for the command line only. Options of `--trainer` that are not
here are decided by this project, and the command line says what to use instead.

Written by `python tests/test_docs.py` from the parser.

| option | value | default | commands | what it does |
|---|---|---|---|---|
"""


def configuration() -> str:
    """docs/configuration.md, from what the parser knows."""
    defaults: dict[str, Any] = {
        option_name(name): value
        for name, value in flatten(yaml.safe_load((CONFIGS / "default.yaml").read_text("utf-8")))
    }
    known: dict[str, tuple[OptionSpec, list[str]]] = {}
    for command in COMMANDS:
        for name, setting in option_specs(command).items():
            known.setdefault(name, (setting, []))[1].append(command)
    lines = HEAD.splitlines()
    for name, (setting, where) in known.items():
        default = defaults.get(name, setting.default)
        shown = (
            "-" if default is OptionSpec._field_defaults["default"] or default in ("", None) else f"`{plain(default)}`"
        )
        value = (METAVARS.get(name) if name in METAVARS else metavar(setting.type)) or "-"
        text = f"{setting.only}: {setting.help}" if setting.only else in_our_words(setting.help)
        commands_ = "all" if len(where) == len(COMMANDS) else ", ".join(where)
        cells = [f"`--{name}`", value, shown, commands_, text]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def in_our_words(text: str) -> str:
    """Lightning's help in this page's markup, without the default, which has a column."""
    text = re.sub(r":paramref:`~[\w.]+\.(\w+)`", r"`\1`", text)
    return re.sub(r"\s*Default: ``.*?``\.$", "", text).replace("``", "`")


def plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace("\n", "\\n")


def test_the_table_of_options_is_that_of_the_parser() -> None:
    assert CONFIGURATION.read_text("utf-8") == configuration(), "run python tests/test_docs.py"


if __name__ == "__main__":
    CONFIGURATION.write_text(configuration(), "utf-8")
