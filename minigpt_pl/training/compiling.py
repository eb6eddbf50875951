"""Whether torch.compile works on this machine: tried before a run is begun, since it fails only in the first step."""

import secrets

import torch

from minigpt_pl.runtime.errors import UserError, one_line


def check_compiler(device: torch.device) -> None:
    """Compiles a tiny function for a device.

    Raises:
        UserError: If that fails: most often there is no C++ compiler.
    """
    number = secrets.randbits(40) / 2**20  # no cache has the result

    def scale(x: torch.Tensor) -> torch.Tensor:
        return (x * number).sin()

    try:
        torch.compile(scale)(torch.ones(64, device=device))
    except Exception as error:  # of the compiler's many parts, each with its own types
        cause = one_line(error).split(" Set TORCH")[0][:200]
        remedy = "install a C++ compiler such as g++, or use --model.compile false"
        raise UserError(f"torch.compile fails on this machine ({cause})", remedy=remedy) from error
