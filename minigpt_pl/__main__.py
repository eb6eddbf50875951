"""Where `minigpt` and `python main.py` begin: signals, the table of commands, errors into exit statuses.

Nothing heavy is imported before the command is known, so the list of commands and a mistyped one answer at once.
"""

import os
import sys

from minigpt_pl.runtime import signals

COMMANDS = {  # name: (module, what it does); each module has run(command, options)
    "fit": ("minigpt_pl.cli.app", "train a model, or go on with a run"),
    "validate": ("minigpt_pl.cli.app", "score a checkpoint on the validation part"),
    "test": ("minigpt_pl.cli.app", "score a checkpoint on the test part"),
    "predict": ("minigpt_pl.cli.app", "continue a prompt"),
    "study": ("minigpt_pl.experiments.runner", "run configurations over seeds, and compare them"),
    "report": ("minigpt_pl.experiments.report", "write what the results of a study say"),
    "baselines": ("minigpt_pl.data.baselines", "what n-grams and xz make of a text"),
    "export": ("minigpt_pl.cli.export", "write a checkpoint as a Hugging Face folder"),
    "doctor": ("minigpt_pl.cli.doctor", "check this machine"),
}
HELP = "\n".join(
    [
        "usage: minigpt COMMAND [options]\n",
        *(f"  {name:10}{what}" for name, (_, what) in COMMANDS.items()),
        "\nminigpt COMMAND --help lists the options of a command",
    ]
)


def main(args: list[str] | None = None) -> int:
    """Runs a command; returns its exit status: 0 done, 2 the user's to mend, 3 diverged, 128 + n after signal n."""
    signals.install_handlers()
    from argparse import ArgumentError
    from importlib import import_module

    from minigpt_pl.runtime.errors import DivergenceError, UserError, is_rank_zero, one_line, rank_zero_print

    words = sys.argv[1:] if args is None else list(args)
    command, options = (words[0], words[1:]) if words else ("", [])
    try:
        if command in ("-h", "--help"):
            print(HELP)
        elif command in COMMANDS:
            status: int = import_module(COMMANDS[command][0]).run(command, options) or 0
            sys.stdout.flush()  # here a reader that has gone is no error
            return status
        else:
            from difflib import get_close_matches

            near = get_close_matches(command, COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"give one of {', '.join(COMMANDS)}"
            what = f"{command} is no command, which comes first" if command else "a command is missing"
            raise UserError(f"{what}: {hint}")
    except (UserError, ArgumentError) as error:
        rank_zero_print(f"error: {one_line(error)}")
        return 2
    except DivergenceError as error:
        rank_zero_print(
            f"error: the run diverged at {one_line(error)}; a lower --model.lr and --model.muon_lr may help"
        )
        return 3 if is_rank_zero() else 0  # Lightning kills the first process where another one fails
    except BrokenPipeError:  # predict | head: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.filename is None:
            raise
        rank_zero_print(f"error: {error.filename}: {error.strerror}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
