"""The pages in docs/ are true: commands run or parse, links and names exist, quoted numbers are those of reports."""

import json
import re
import shlex
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import configuration_page
import learning_curve
import page_example
import pytest
import report_table
import yaml
from conftest import PROJECT, TINY, Outcome

from minigpt_pl.data.baselines import compute_baselines
from minigpt_pl.page.build import render_page

PAGES = sorted(PROJECT.glob("docs/*.md"))
README = PROJECT / "README.md"
PARSED_COMMANDS = ("fit", "validate", "test", "predict")
NOT_RUN = (*PARSED_COMMANDS, "doctor", "study", "report")
OTHER_PROGRAMS = {  # an argument that each line of another program must have
    "wandb": {"login", "sync", "sweep", "agent"},
    "torchrun": {"--nproc-per-node", "--nnodes"},
    "tensorboard": {"--logdir"},
    "dask": {"scheduler", "worker"},
    "sbatch": {"train.sh"},
    "pip": {"install"},
}


def page_commands(page: Path) -> list[str]:
    """The lines of a page's bash blocks; lines that end in a backslash are joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]


OWN_CLASSES = "my_module"
"""A module of the reader's; `integration/test_python_page.py` runs the commands that name it."""
COMMANDS = [(page, command) for page in PAGES for command in page_commands(page) if OWN_CLASSES not in command]


def minigpt_args(command: str) -> list[str]:
    """The arguments of `minigpt` or `main.py` in a command; [] if it runs another program."""
    args = shlex.split(command, comments=True)
    if args and args[0] == "minigpt":
        return args[1:]
    return args[args.index("main.py") + 1 :] if "main.py" in args else []


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run and a text."""
    from minigpt_pl.__main__ import main

    folder = tmp_path_factory.mktemp("docs")
    (folder / "my.txt").write_text("the sea comes in, the sea goes out.\n" * 200, "utf-8")
    sizes = ["--trainer.max_steps=4", "--data.eval_every=4", "--model.conv_kernel_size=0"]
    assert main(["fit", *TINY, *sizes, f"--data.path={folder / 'my.txt'}", f"--run_dir={folder / 'run'}"]) == 0
    return folder


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page.stem}: {command}" for page, command in COMMANDS])
def test_a_command_parses(page: Path, command: str, monkeypatch: pytest.MonkeyPatch, trained: Path) -> None:
    monkeypatch.chdir(trained)
    args = minigpt_args(command)
    if args and args[0] in PARSED_COMMANDS:
        args = [str(trained / "run" / Path(arg).name) if arg.endswith(".ckpt") else arg for arg in args]
        if "--ckpt_path" in args and "--run_dir" in args:
            args[args.index("--run_dir") + 1] = str(trained / "run")
        assert_parses(args, monkeypatch)
    elif not args:
        program, *rest = shlex.split(command)
        if (program, *rest[:2]) == ("python", "-m", "pytest"):
            paths = [arg for arg in rest if arg.startswith("tests/")]
        elif program == "python":
            paths = rest[:1]
        else:
            paths = []
            assert any(arg.split("=")[0] in OTHER_PROGRAMS[program] for arg in rest)
        assert all((PROJECT / path).exists() for path in paths)


def assert_parses(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parses a command line and stops before anything is built. A refused one raises UserError."""
    from minigpt_pl.cli.app import MiniGPTCLI

    class Parsed(Exception):
        pass

    def stop(self: MiniGPTCLI) -> None:
        raise Parsed

    monkeypatch.setattr(MiniGPTCLI, "instantiate_classes", stop)
    with pytest.raises(Parsed):
        MiniGPTCLI(args[0], args[1:])


def test_export_and_baselines_run(minigpt: Callable[..., Outcome], trained: Path, tmp_path: Path) -> None:
    """And every other command that neither trains nor needs a parser of its own."""
    exported = tmp_path
    for number, (_, command) in enumerate(COMMANDS):
        args = minigpt_args(command)
        if not args or args[0] in NOT_RUN or "--serve" in args:
            continue
        replaced = {
            "--run_dir": trained / "run",
            "--ckpt_path": trained / "run" / "best.ckpt",
            "--compare": trained / "run" / "best.ckpt",
            "--out": tmp_path / str(number),
            "--data.path": trained / "my.txt",
        }
        if args[0] == "import":  # what the page's last export wrote
            args[1] = str(exported)
        for option, path in replaced.items():
            if option in args:
                args[args.index(option) + 1] = str(path)
        args = [str(trained) if arg == "runs" else arg for arg in args]
        exported = tmp_path / str(number) if args[0] == "export" else exported
        result = minigpt(*args)
        assert result.status == 0, f"{command}: {result.err}"


def test_the_example_page_has_the_present_scripts() -> None:
    """`python docs/build/page_example.py` puts it together again."""
    page = page_example.PAGE.read_text("utf-8")
    assert page == render_page(*page_example.parts(page))
    assert len(page) < 3e6
    assert not re.search(r"/(home|work|tmp|root|Users)/", json.dumps(page_example.parts(page)[0]["runs"]))


def test_study_commands_name_studies_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples on the page are planned too, which resolves the options of their runs."""
    from minigpt_pl.experiments.runner import build_parser
    from minigpt_pl.experiments.spec import STUDY_FILE, find_study, plan, read_study

    monkeypatch.chdir(tmp_path)
    page = (PROJECT / "docs" / "study.md").read_text("utf-8")
    examples = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    for name, example in zip(("NAME.yaml", "wide.yaml"), reversed(examples), strict=True):
        Path(name).write_text(example, "utf-8")
        planned = plan(read_study(Path(name)), Path("out"), Path("runs", Path(name).stem), seeds=1, only=[])
        uses = [run.uses for run in planned]
        assert uses == ([(), ("teacher-2337",)] if name == "NAME.yaml" else [(), ()])
    for command, *args in filter(None, (minigpt_args(line) for _, line in COMMANDS)):
        if command == "study":
            options = build_parser("study").parse_args(args)
            assert set(options.only) <= read_study(find_study(options.file)).variants.keys()
        elif command == "report" and len(args) == 1:  # else two runs of the reader
            assert (PROJECT / args[0] / STUDY_FILE).is_file(), args


def test_the_sweep_calls_our_command_line(
    monkeypatch: pytest.MonkeyPatch, minigpt: Callable[..., Outcome], trained: Path, tmp_path: Path
) -> None:
    """Runs its command as W&B's agent fills it in, with --NAME=VALUE for each parameter, but offline and small."""
    import wandb

    from minigpt_pl.checkpoint.io import read_checkpoint

    sweep = yaml.safe_load((PROJECT / "docs" / "wandb-sweep.yaml").read_text("utf-8"))
    parameters = [f"--{name}={parameter['values'][0]}" for name, parameter in sweep["parameters"].items()]
    macros = {"${env}": [], "${interpreter}": ["python"], "${args}": parameters}
    program, file, *args = [arg for item in sweep["command"] for arg in macros.get(item, [item])]
    assert (program, file) == ("python", "main.py")
    assert minigpt(*args, "--model.lrr=1").status == 2

    wandb.setup()  # before it sees the sweep's variables, which would stay for later tests
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    small = ("-c", "smoke", "--data.path", trained / "my.txt", "--samples", "null", "--wandb.offline=true")
    result = minigpt(*args, *small, "--trainer.max_steps=4", "--run_dir", tmp_path / "run")
    assert result.status == 0, result.err
    assert sweep["metric"]["name"] in json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert list(tmp_path.glob("run/wandb/offline-run-*-chosen"))
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["wandb_id"] == "chosen"


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda page: page.name)
def test_links_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def test_readme_links_to_every_page() -> None:
    readme = README.read_text("utf-8")
    for page in [*PAGES, *PROJECT.glob("docs/*.svg")]:
        assert f"(docs/{page.name})" in readme, page.name


def table_rows(text: str) -> dict[str, list[str]]:
    """The cells of all tables, by the name in backticks at the start of a row."""
    rows: dict[str, list[str]] = {}
    for name, cells in re.findall(r"^\| `([^`]+)` \|(.*)\|$", text, re.MULTILINE):
        rows.setdefault(name, []).extend(cells.split("|"))
    return rows


def decimals(text: str) -> list[str]:
    return re.findall(r"-?\d+\.\d+", text)


def test_quoted_numbers_are_those_of_the_report() -> None:
    """A table row belongs to the report that is linked last before it."""
    quoted = set()
    for page in [*PAGES, README]:
        _, *linked = re.split(r"\]\(([^)#\s]*results/\w+/report\.md)\)", page.read_text("utf-8"))
        for target, text in zip(linked[::2], linked[1::2], strict=True):
            report = table_rows((page.parent / target).read_text("utf-8"))
            for name, cells in table_rows(text).items():
                for number in decimals(" ".join(cells)) if name in report else ():
                    digits = len(number.split(".")[1])
                    rounded = {f"{float(value):.{digits}f}" for value in decimals(" ".join(report[name]))}
                    assert number in rounded, f"{page.name}: {name}: {number} is not in {target}"
                    quoted.add(page.stem)
    assert quoted >= {"conclusions", "recipes"}


def test_tests_named_on_a_page_exist() -> None:
    """`test_name` in any file, `folder/test_file.py::test_name` in that file, `tests/...` as a path."""
    tests = PROJECT / "tests"
    sources = {str(path.relative_to(tests)): path.read_text("utf-8") for path in tests.rglob("*.py")}
    named = 0
    for page in PAGES:
        text = page.read_text("utf-8")
        for file, name in re.findall(r"`(?:([\w/]+\.py)::)?(test_\w+)`", text):
            searched = [sources[file]] if file else sources.values()
            assert any(f"def {name}(" in source for source in searched), f"{page.name}: {name}"
            named += 1
        for path in re.findall(r"`(tests/[\w/]+\.py)", text):
            assert (PROJECT / path).is_file(), f"{page.name}: {path}"
    assert named


def test_code_named_in_architecture_exists() -> None:
    """Every part of a dotted name in backticks is a file, class, function, method or constant of the package."""
    files = {
        path.relative_to(PROJECT / "minigpt_pl"): path.read_text("utf-8")
        for path in PROJECT.rglob("minigpt_pl/**/*.py")
    }
    stems = {path.stem for path in files} | {path.name for path in files} | {f"{path.parent}/" for path in files}
    defined = set(
        re.findall(r"^\s*(?:class|def) (\w+)|^(\w+)(?:: [^=\n]+)? = ", "\n".join(files.values()), re.MULTILINE)
    )
    known = stems | {name for pair in defined for name in pair}
    text = (PROJECT / "docs" / "architecture.md").read_text("utf-8")
    names = re.findall(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+|[A-Z_]\w+)`", text)
    assert len(names) > 10
    for name in names:
        parts = [name] if name.endswith((".py", ".csv")) else name.split(".")
        assert name == "metrics.csv" or set(parts) <= known, name
    for path in re.findall(r"`(\w+/\w+\.py)`", text):
        assert (PROJECT / "minigpt_pl" / path).is_file() or (PROJECT / path).is_file(), path


def test_the_page_of_options_is_current() -> None:
    current = configuration_page.PAGE.read_text("utf-8") == configuration_page.render()
    assert current, "run python docs/build/configuration_page.py"


def curve_labels(path: Path) -> set[str]:
    """The labels beside the lines of a learning curve, such as `bigram 2.334`."""
    return set(re.findall(r">(\S+ (?:model )?\d\.\d{3})</text>", path.read_text("utf-8")))


def expected_labels(text: str, train_frac: float, best: float) -> set[str]:
    values = {name: metrics["nats_per_char"] for name, metrics in compute_baselines(text, train_frac, 0.0).items()}
    return {f"{name} {value:.3f}" for name, value in (values | {"this model": best}).items()}


def test_the_curve_is_that_of_readmes_run() -> None:
    readme = README.read_text("utf-8")
    best = float(re.findall(r"best val/loss (.*?) ", readme)[0])
    assert curve_labels(learning_curve.CURVE) == expected_labels("data/input.txt", 0.9, best)


def test_the_pages_and_the_picture_have_the_results_on_the_reports_text() -> None:
    rows = report_table.read_rows()
    table = report_table.table(rows)
    assert table in README.read_text("utf-8"), "run python docs/build/report_table.py"
    conclusions = (PROJECT / "docs/conclusions.md").read_text("utf-8")
    assert report_table.estimators(rows) in conclusions
    assert report_table.differences() in conclusions
    assert report_table.seeds(rows) in (PROJECT / "docs/journey.md").read_text("utf-8")
    picture = xml.etree.ElementTree.parse(report_table.PICTURE)
    assert [e.text for e in picture.iter("{http://purl.org/dc/elements/1.1/}description")] == [table]


@pytest.mark.parametrize(("mean", "verdict"), [(1.90, "yes"), (1.95, "no, below"), (1.80, "no, above")])
def test_the_reports_value_is_compared_with_one_more_seed(mean: float, verdict: str) -> None:
    """The next of three values with SD 0.01 is expected within 4.303 * 0.01 * sqrt(4 / 3), or 0.0497, of their mean."""
    results = [SimpleNamespace(summary={"best_val": mean + off}) for off in (-0.01, 0.0, 0.01)]
    row = report_table.Row(6, "modern_dense_control", 1.8966, None, SimpleNamespace(results=results))  # type: ignore[arg-type]
    assert report_table.inside(row) == verdict
    low, high = report_table.next_seed(row.values("best_val"))
    assert (mean - low, high - mean) == pytest.approx((0.0497, 0.0497), abs=1e-4)


def test_a_run_is_drawn_beside_the_baselines_of_its_text(trained: Path, tmp_path: Path) -> None:
    learning_curve.draw(trained / "run", tmp_path / "curve.svg")
    summary = json.loads((trained / "run" / "summary.json").read_text("utf-8"))
    expected = expected_labels(
        str(trained / "my.txt"), summary["config"]["data"]["train_frac"], summary["best_nats_per_char"]
    )
    assert curve_labels(tmp_path / "curve.svg") == expected
