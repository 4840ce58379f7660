"""Orders that depend on nothing but their key: no generator state, no NumPy version, no worker count.

SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF
_ORDER, _ITEMS, _COINS = 0, 1, 2  # part of every result: add, never change

POOL = 16
"""Chunks whose items are mixed with each other in the pooled order."""


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
    return np.argsort(_keys(seed, epoch, n), kind="stable").astype(np.int64)


def pooled(seed: int, epoch: int, n: int, chunk: int) -> NDArray[np.int64]:
    """An order of n items that lie in chunks of so many, in which a chunk is fetched once and soon used up.

    The chunks are permuted, each 16 of them that follow each other are a pool, and the items of a
    pool are permuted.

    Args:
        seed: any integer; its lowest 64 bits count.
        epoch: as the seed.
        n: how many items.
        chunk: items in a chunk; the last one may hold fewer.

    Returns:
        (n,) int64: the item at each position.
    """
    chunks = permutation(seed, epoch, -(-n // chunk))
    pool = np.empty_like(chunks)
    pool[chunks] = np.arange(len(chunks)) // POOL
    return np.lexsort((_keys(seed, epoch, n, _ITEMS), pool[np.arange(n) // chunk])).astype(np.int64)


def coins(seed: int, epoch: int, n: int) -> NDArray[np.bool_]:
    """A fair coin for each of n things in an epoch, (n,)."""
    return (_keys(seed, epoch, n, _COINS) >> np.uint64(63)).astype(np.bool_)


def _keys(seed: int, epoch: int, n: int, use: int = _ORDER) -> NDArray[np.uint64]:
    """The first n outputs of a SplitMix64 that is keyed by seed, epoch and what they are for."""
    key = splitmix64(np.array([seed & _MASK], np.uint64))
    key = splitmix64(key ^ np.uint64(epoch & _MASK))
    if use:
        key = splitmix64(key ^ np.uint64(use))
    return splitmix64(key + np.arange(n, dtype=np.uint64) * np.uint64(_GOLDEN))
