"""Random orders that depend on their key alone, not on a generator's state, NumPy's version or the workers.

NumPy does not promise its random streams across versions, so the random numbers are made here.
SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF
_ORDER, _ITEMS, _COINS = 0, 1, 2  # purposes, hashed into the key: to change one changes every order

POOL = 16
"""Chunks whose items are shuffled together in the pooled order."""


def splitmix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output of SplitMix64 for each state. It maps the 64-bit words one to one.

    Args:
        state: (...) uint64.

    Returns:
        (...) uint64.
    """
    z = state + np.uint64(_GOLDEN)  # unsigned arrays wrap around, as the method needs
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permutation(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """A random order of n items: item i is sorted by the i-th output of a SplitMix64 keyed by seed and epoch.

    Args:
        seed: any integer; its lowest 64 bits are used.
        epoch: any integer, as the seed.
        n: number of items.

    Returns:
        (n,) int64: the item at each position.

    Examples:
        >>> permutation(seed=0, epoch=1, n=6)
        array([0, 4, 3, 2, 1, 5])
    """
    return np.argsort(_keys(seed, epoch, n), kind="stable").astype(np.int64)


def pooled(seed: int, epoch: int, n: int, chunk: int) -> NDArray[np.int64]:
    """A random order of n items stored in chunks, in which few chunks are in use at a time.

    The chunks are permuted and grouped into pools of `POOL`; then the items of each pool are permuted.
    So each chunk is fetched once an epoch and dropped when its pool is done.

    Args:
        seed: any integer; its lowest 64 bits are used.
        epoch: any integer, as the seed.
        n: number of items.
        chunk: items of a chunk; the last one may hold fewer.

    Returns:
        (n,) int64: the item at each position.

    Examples:
        >>> pooled(seed=0, epoch=1, n=6, chunk=2)
        array([5, 4, 1, 3, 2, 0])
    """
    chunks = permutation(seed, epoch, -(-n // chunk))
    pool = np.empty_like(chunks)
    pool[chunks] = np.arange(len(chunks)) // POOL
    return np.lexsort((_keys(seed, epoch, n, _ITEMS), pool[np.arange(n) // chunk])).astype(np.int64)


def coins(seed: int, epoch: int, n: int) -> NDArray[np.bool_]:
    """A fair coin for each of n items in an epoch: (n,) bool."""
    return (_keys(seed, epoch, n, _COINS) >> np.uint64(63)).astype(np.bool_)


def _keys(seed: int, epoch: int, n: int, purpose: int = _ORDER) -> NDArray[np.uint64]:
    """The first n outputs of a SplitMix64 keyed by seed, epoch and purpose."""
    key = splitmix64(np.array([seed & _MASK], np.uint64))
    key = splitmix64(key ^ np.uint64(epoch & _MASK))
    if purpose:
        key = splitmix64(key ^ np.uint64(purpose))
    return splitmix64(key + np.arange(n, dtype=np.uint64) * np.uint64(_GOLDEN))
