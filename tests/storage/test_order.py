import hashlib

import numpy as np
import pytest

from storage.order import POOL, coins, permutation, pooled, splitmix64

MASK = 2**64 - 1


def digest(values: np.ndarray, dtype: str = "<i8") -> str:
    return hashlib.sha256(values.astype(dtype).tobytes()).hexdigest()


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
    expected = "560b1e927356994a7d00ec06e9ce0be1a325384252d0231e9e060c84272c5c70"
    assert digest(permutation(0, 0, 100_000)) == expected


def test_seed_and_epoch_both_count() -> None:
    orders = {tuple(permutation(seed, epoch, 50)) for seed in (-1, 0, 1) for epoch in (0, 1, 2)}
    assert len(orders) == 9


@pytest.mark.parametrize(("n", "chunk"), [(0, 4), (1, 4), (64, 4), (1000, 7), (131, 1), (50, 100)])
def test_pooled_order_holds_every_item_once_chunk_by_chunk(n: int, chunk: int) -> None:
    order = pooled(5, 2, n, chunk)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))
    chunks = permutation(5, 2, -(-n // chunk))
    place = 0
    for first in range(0, len(chunks), POOL):
        pool = chunks[first : first + POOL]
        size = sum(min(chunk, n - c * chunk) for c in pool)
        assert set(order[place : place + size] // chunk) == set(pool)
        place += size
    assert place == n


def test_pooled_order_is_the_sort_of_a_keyed_stream_within_a_pool() -> None:
    seed, epoch, n = 7, 3, 60
    key = reference(reference(reference(seed) ^ epoch) ^ 1)
    keys = [reference((key + i * 0x9E3779B97F4A7C15) & MASK) for i in range(n)]
    assert pooled(seed, epoch, n, 4).tolist() == sorted(range(n), key=keys.__getitem__)  # one pool


def test_pooled_order_mixes_chunks() -> None:
    order = pooled(0, 0, 4096 * 4, 256)
    for first in range(0, len(order), 256):
        assert len(set(order[first : first + 256] // 256)) == POOL


def test_coins_are_fair_and_of_each_epoch() -> None:
    found = np.array([coins(0, epoch, 1000) for epoch in range(20)])
    assert abs(found.mean() - 0.5) < 4 * 0.5 / found.size**0.5
    agree = (found[1:] == found[:-1]).mean()
    assert abs(agree - 0.5) < 4 * 0.5 / found.size**0.5


def test_pooled_order_and_coins_never_change() -> None:
    assert digest(pooled(0, 0, 100_000, 256)) == "f990d43b8fb465836ef56b4e9206d6f6cf4c48fbbccf0df116e59282ff2a6c53"
    assert digest(pooled(3, 7, 100_000, 64)) == "0c79fee919fb69c3712fc8ce9713cb97ada75822c64fdb8c922a0031883d8784"
    assert digest(coins(0, 0, 100_000), "u1") == "b5012f90cb3b9d241108e1106d326a332151c1938780af452532584e2c46aa55"
