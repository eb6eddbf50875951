"""The command `baselines`: prints what n-gram models and xz reach on a text. How they count is in `data.baselines`."""

from jsonargparse import ArgumentParser

from minigpt_pl.data.baselines import compute_baselines
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.runtime.ranges import Fraction, OpenUnitInterval

DESCRIPTION = "Prints the losses of n-gram models and xz on a text. A trained model should beat them."


def run(command: str, args: list[str]) -> int:
    """Runs the command; returns the exit status.

    Raises:
        UserError: If the text cannot be used.
    """
    parser = ArgumentParser(prog=f"minigpt {command}", exit_on_error=False, description=DESCRIPTION)
    parser.add_argument("--data.path", type=str, default="data/input.txt", help="The text file.")
    parser.add_argument("--data.train_frac", type=OpenUnitInterval, default=0.9, help="Share to count, from the start.")
    parser.add_argument("--data.test_frac", type=Fraction, default=0.0, help="Share to leave out, at the end.")
    data = parser.parse_args(args).data
    if not isinstance(data.path, str):
        raise UserError("expected the path of a text file", option="data.path", value=data.path)
    baselines = compute_baselines(data.path, data.train_frac, data.test_frac)
    print(f"{'method':10}{'nats/char':>12}{'bits/byte':>12}")
    for name, metrics in baselines.items():
        print(f"{name:10}{metrics['nats_per_char']:12.4f}{metrics['bits_per_byte']:12.4f}")
    return 0
