import hashlib

import numpy as np

from storage.order import permutation, splitmix64

MASK = 2**64 - 1


def reference(state: int) -> int:
    """SplitMix64 in Python's own integers."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_splitmix64_published_outputs() -> None:
    # The first outputs for seed 1234567, as given with the public-domain reference implementation.
    states = (np.uint64(1234567) + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_permutation_is_the_sort_of_a_keyed_stream() -> None:
    seed, epoch, n = 7, 3, 100
    key = reference(reference(seed) ^ epoch)
    keys = [reference((key + i * 0x9E3779B97F4A7C15) & MASK) for i in range(n)]
    assert permutation(seed, epoch, n).tolist() == sorted(range(n), key=keys.__getitem__)


def test_permutation_holds_every_item_once() -> None:
    for n in (0, 1, 2, 1000):
        order = permutation(5, 0, n)
        assert order.dtype == np.int64
        assert np.array_equal(np.sort(order), np.arange(n))


def test_permutation_never_changes() -> None:
    digest = hashlib.sha256(permutation(0, 0, 100_000).astype("<i8").tobytes()).hexdigest()
    assert digest == "560b1e927356994a7d00ec06e9ce0be1a325384252d0231e9e060c84272c5c70"


def test_seed_and_epoch_both_count() -> None:
    orders = {tuple(permutation(seed, epoch, 50)) for seed in (-1, 0, 1) for epoch in (0, 1, 2)}
    assert len(orders) == 9
