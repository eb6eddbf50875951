"""Random numbers that are pure functions of their purpose: no generator's state is stored or shared.

Batches, dropout and sampled text each have their own purpose, so none can disturb another.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray


def derive_seed(*purpose: object, size: int = 16) -> int:
    """A number of `size` bytes for a purpose such as (seed, "batch", step)."""
    key = "/".join(map(str, purpose)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=size).digest(), "little")


def uniform(count: int, *purpose: object) -> NDArray[np.float64]:
    """`count` numbers in [0, 1), 53 bits each (Philox, Salmon et al. 2011); a larger count only appends numbers."""
    raw = np.random.Philox(key=derive_seed(*purpose)).random_raw(count)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
