"""Random numbers that are pure functions of what they are for: nothing random is ever stored or used up.

Batches, dropout, windows and sampled text each name their purpose; none can disturb another.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray


def derive_seed(*purpose: object, size: int = 16) -> int:
    """A number of `size` bytes for a purpose such as (seed, "batch", step)."""
    words = "/".join(map(str, purpose)).encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=size).digest(), "little")


def uniform(count: int, *purpose: object) -> NDArray[np.float64]:
    """`count` numbers in [0, 1), 53 bits each; a larger count only adds to them (Philox, Salmon et al. 2011)."""
    raw = np.random.Philox(key=derive_seed(*purpose)).random_raw(count)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
