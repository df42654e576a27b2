"""Numbers that look random and depend on nothing but their seeds: what every order and split of data is made from.

SplitMix64 in numpy. numpy's own generators do not promise the same stream from one version to the next, and the
order of a training run must outlive an upgrade.
"""

import hashlib

import numpy as np


def hashes(num: int, *seeds: int | str) -> np.ndarray:
    """[num] uint64: number i is a function of i and the seeds alone."""
    start = int.from_bytes(hashlib.sha256(repr(seeds).encode()).digest()[:8], "little")
    z = np.arange(1, num + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permutation(num: int, *seeds: int | str) -> np.ndarray:
    """[num] int64: the numbers below `num` in an order that depends on the seeds alone."""
    # SplitMix64 maps different numbers to different ones, so there are no ties and any sort gives this order
    return np.argsort(hashes(num, *seeds))
