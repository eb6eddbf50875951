"""The command `page`: writes the page of a checkpoint or of runs, or serves that of runs that still train."""

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from minigpt_pl.cli.start import find_start, read_model
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.page.build import render_page
from minigpt_pl.page.models import model_spec, packed_weights, tokenizer_spec
from minigpt_pl.page.runs import find_runs, is_run, read_run
from minigpt_pl.page.server import PageServer
from minigpt_pl.page.texts import read_text, text_baselines
from minigpt_pl.runtime.atomic_io import atomic_write
from minigpt_pl.runtime.errors import UserError, rank_zero_print

ABOUT = """Writes one HTML file that runs a model in the browser and shows how it was trained. Directories of runs give
a page that compares them. The file holds the weights, the validation text and the training text."""


def run(command: str, args: list[str]) -> int:
    """Runs the command; returns the exit status.

    Raises:
        UserError: If a checkpoint or a directory cannot be shown, or the file cannot be written.
    """
    parser = ArgumentParser(prog=f"minigpt {command}", exit_on_error=False, description=ABOUT)
    parser.add_argument("runs", nargs="*", type=str, help="Directories of runs, or directories that hold such.")
    parser.add_argument("--ckpt_path", type=str, default="", help="A file, or best or last in --run_dir.")
    parser.add_argument("--run_dir", type=str, default="", help="Directory of --ckpt_path last and best.")
    parser.add_argument("--compare", type=str, default="", help="The checkpoint of a second model of the same text.")
    parser.add_argument("--data.path", type=str, default="", help="The text, if it is no longer where the run read it.")
    parser.add_argument("--out", type=str, default="page.html", help="The file to write.")
    parser.add_argument("--serve", action="store_true", help="Serve the page of runs, and refresh it.")
    parser.add_argument("--port", type=int, default=8000, help="The port of --serve; 0 for a free one.")
    options = parser.parse_args(args)
    checkpoint = options.ckpt_path or options.run_dir and "best"
    if bool(checkpoint) == bool(options.runs):
        raise UserError("page shows a checkpoint or runs", remedy="use --ckpt_path FILE, or name directories of runs")
    if options.compare and not checkpoint:
        raise UserError("--compare needs the checkpoint to compare with", remedy="add --ckpt_path FILE")
    if options.serve:
        if checkpoint:
            raise UserError("--serve is for runs", remedy="name their directory: minigpt page --serve runs")
        return serve(options.runs, options.port)
    if checkpoint:
        first = find_start(checkpoint, options.run_dir, command)
        paths = [path for path in (first, Path(options.compare) if options.compare else None) if path]
        payload, weights = model_page(paths, options.data.path)
    else:
        payload, weights = runs_page(options.runs, live=False), []
    out = Path(options.out)
    try:
        atomic_write(out, (content := render_page(payload, weights)).encode())
    except OSError as error:
        problem = f"it cannot be written ({error.strerror})"
        raise UserError(problem, option="--out", value=out, remedy="name another file") from None
    print(f"{out} ({len(content) / 1e6:.1f} MB): open it in a browser")
    return 0


def model_page(paths: list[Path], text_path: str) -> tuple[dict[str, Any], list[bytes]]:
    """The data of a page of one or two checkpoints, and their weights."""
    models: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    weights, modules = [], []
    for path in paths:
        checkpoint, net, data = read_model(path, text_path)
        shapes, packed = packed_weights(net)
        folder = path.resolve().parent
        models.append(
            {"name": folder.name, "spec": model_spec(net), "shapes": shapes, "step": checkpoint["global_step"]}
        )
        weights.append(packed)
        modules.append(data)
        if is_run(folder) and folder.name not in [run["name"] for run in runs]:
            runs.append(read_run(folder))
    first = modules[0]
    for path, data in zip(paths[1:], modules[1:], strict=True):
        if data.tokenizer.sha256 != first.tokenizer.sha256:
            raise UserError("its tokenizer is another one", option="compare", value=path, remedy="leave it out")
    names = [model["name"] for model in models]
    if len(set(names)) < len(names):
        for path, model in zip(paths, models, strict=True):
            model["name"] = f"{model['name']}/{path.stem}"
    texts = text_of(first)
    for run in runs:  # the text may be elsewhere by now than the run's own files say
        if run["baselines"] is None and texts["text"]:
            run["baselines"] = text_baselines(first)
    payload = {
        "title": f"{' and '.join(model['name'] for model in models)}, step {models[0]['step']:,}",
        "models": models, "tokenizer": tokenizer_spec(first.tokenizer), "prompt": "\n", "runs": runs, "live": False,
        **texts,
    }  # fmt: skip
    return payload, weights


def text_of(data: TextDataModule) -> dict[str, Any]:
    """The text of a model; without the text the page can still write, and read a pasted one."""
    try:
        text, training_text = read_text(data)
        return {"text": text, "training_text": training_text}
    except UserError as error:
        rank_zero_print(f"the page has no text to read: {error}")
        return {"text": None, "training_text": ""}


def runs_page(places: list[str], live: bool) -> dict[str, Any]:
    """The data of a page without a model."""
    runs = [read_run(path) for path in find_runs(places)]
    return {"title": f"{len(runs)} runs", "models": [], "runs": runs, "live": live}


def serve(places: list[str], port: int) -> int:
    """Serves the page of runs until Ctrl-C."""
    find_runs(places)
    try:
        server = PageServer(
            port, lambda: render_page(runs_page(places, live=True), []), lambda: runs_page(places, live=True)["runs"]
        )
    except OSError as error:
        raise UserError(f"it cannot be used ({error.strerror})", option="--port", value=port, remedy="use 0") from None
    print(f"http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
    with server:
        server.serve_forever()
    return 0
