"""Orders that depend on nothing but their key: no generator state, no NumPy version, no worker count.

SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF


def splitmix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output of SplitMix64 for every state: a bijection of the 64-bit words.

    Args:
        state: (...) uint64.

    Returns:
        (...) uint64.
    """
    z = state + np.uint64(_GOLDEN)  # arrays wrap around silently, as the method wants
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permutation(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order of n items in an epoch: item i is ranked by the i-th output of a keyed SplitMix64.

    Args:
        seed: any integer; its lowest 64 bits count.
        epoch: as the seed.
        n: how many items.

    Returns:
        (n,) int64: the item at each position.
    """
    key = splitmix64(np.array([seed & _MASK], np.uint64))
    key = splitmix64(key ^ np.uint64(epoch & _MASK))
    keys = splitmix64(key + np.arange(n, dtype=np.uint64) * np.uint64(_GOLDEN))
    return np.argsort(keys, kind="stable").astype(np.int64)
