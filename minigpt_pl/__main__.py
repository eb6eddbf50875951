"""The entry point of `minigpt` and `python main.py`: signals, the table of commands, errors into exit statuses.

Nothing heavy is imported before the command is known: the list of commands and an unknown command answer at once.
"""

import sys

from minigpt_pl.runtime import signals

COMMANDS = {  # name: (module, what the command does); each module has run(command, args)
    "fit": ("minigpt_pl.cli.app", "train a model, or resume a run"),
    "validate": ("minigpt_pl.cli.app", "evaluate a checkpoint on the validation split"),
    "test": ("minigpt_pl.cli.app", "evaluate a checkpoint on the test split"),
    "predict": ("minigpt_pl.cli.app", "generate text from a prompt"),
    "study": ("minigpt_pl.experiments.runner", "train configurations with several seeds and compare them"),
    "report": ("minigpt_pl.experiments.report", "write a report on the results of a study, or compare two runs"),
    "baselines": ("minigpt_pl.cli.baselines", "score n-gram models and xz on a text"),
    "export": ("minigpt_pl.cli.export", "convert a checkpoint to a Hugging Face folder"),
    "chat": ("minigpt_pl.cli.chat", "write with a model in the terminal, line by line"),
    "copies": ("minigpt_pl.cli.copies", "how much of what a model writes stands in its training text"),
    "page": ("minigpt_pl.page.command", "write an HTML page that runs a model, or compares runs"),
    "import": ("minigpt_pl.cli.import_folder", "convert such a folder back to a checkpoint"),
    "doctor": ("minigpt_pl.cli.doctor", "check that training works on this machine"),
}
OTHER_NAMES = {  # words of other tools: the command that does this here
    "train": "fit", "pretrain": "fit", "finetune": "fit", "resume": "fit --run_dir DIR --ckpt_path last",
    "sample": "predict", "generate": "predict", "inference": "predict",
    "eval": "validate", "evaluate": "validate", "val": "validate",
    "convert": "export", "view": "page", "visualize": "page", "html": "page", "sweep": "study", "check": "doctor",
}  # fmt: skip
HELP = "\n".join(
    [
        "usage: minigpt COMMAND [options]\n",
        *(f"  {name:11}{description}" for name, (_, description) in COMMANDS.items()),
        "\nminigpt COMMAND --help lists the options of a command",
    ]
)


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit status: 0 success, 2 user error, 3 diverged, 128 + n after signal n."""
    signals.install_handlers()
    from argparse import ArgumentError
    from importlib import import_module

    from minigpt_pl.runtime.errors import DivergenceError, UserError, is_rank_zero, one_line, rank_zero_print
    from minigpt_pl.runtime.output import discard_stdout, protect_output, stdout_problem
    from minigpt_pl.runtime.quiet import silence_libraries

    silence_libraries()
    protect_output()
    command, *args = (sys.argv[1:] if argv is None else argv) or [""]
    try:
        if command in ("-h", "--help"):
            print(HELP)
        elif command in COMMANDS:
            status: int = import_module(COMMANDS[command][0]).run(command, args) or 0
            sys.stdout.flush()  # raises BrokenPipeError here if the reader of a pipe has closed it
            return status
        else:
            from difflib import get_close_matches

            near = [OTHER_NAMES.get(name, name) for name in get_close_matches(command, [*COMMANDS, *OTHER_NAMES], n=1)]
            remedy = f"did you mean {near[0]}?" if near else f"use one of {', '.join(COMMANDS)}"
            problem = f"{command}: there is no such command" if command else "a command is missing"
            raise UserError(problem, remedy=remedy)
    except (UserError, ArgumentError) as error:
        rank_zero_print(f"error: {one_line(error)}")
        return 2
    except DivergenceError as error:
        rank_zero_print(
            f"error: the run diverged at {one_line(error)}; a lower --model.lr and --model.muon_lr may help"
        )
        return 3 if is_rank_zero() else 0  # if another process fails, Lightning kills the first one
    except BrokenPipeError:  # predict | head
        discard_stdout()
    except OSError as error:
        place = error.filename
        if place is None and stdout_problem():
            place = "the output"
            discard_stdout()
        if place is None:
            raise
        rank_zero_print(f"error: {place}: {error.strerror}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
