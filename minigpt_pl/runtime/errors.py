"""What is the user's to mend, and how it is said in one line; how a diverged run is told from a bug.

No error is caught here: `__main__` turns these into exit statuses.
"""

import os
import re
import sys

PARSER_NOISE = [  # the parser's wording, and ours
    (r"(?s)Does not validate against any of the Union subtypes\s+Subtypes: .*?\s+Errors:", ""),
    (r"(?s)\s+Given value type: .*?\s+Given value: (?:NestedArg|Namespace).*", ""),
    (r"\s+Given value type: .*?\s+Given value:", ". Got value:"),
    (r"\s+- (?:Expected a <class 'NoneType'>|Expected a path but .* not accessible or invalid)", ""),
    (r'Parser key "(.*?)":', r"\1:"),
    (r"typing\.Literal|<class '(\w+)'>", r"\1"),
    (r":\s+- ", ": "),
]


class UserError(ValueError):
    """The user's input or machine is at fault: one line on stderr, exit status 2."""


class DivergenceError(RuntimeError):
    """The loss, the gradient or a weight is no longer a finite number: exit status 3."""


def is_rank_zero() -> bool:
    """Whether this is the process that the user started, or the first of those that torchrun or SLURM started."""
    return not any(int(os.environ.get(name) or 0) for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID", "NODE_RANK"))


def rank_zero_print(message: str) -> None:
    """One line on stderr, once, however many processes there are."""
    if is_rank_zero():
        print(message, file=sys.stderr)


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks and without the parser's chatter."""
    text = str(error) or type(error).__name__
    for theirs, ours in PARSER_NOISE:
        text = re.sub(theirs, ours, text)
    return " ".join(text.split())
