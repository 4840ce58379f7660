import numpy as np
import pytest
import torch

from dit.metrics import resample
from dit.metrics.frechet import Statistics
from dit.metrics.resample import fd_infinity, fd_standard_error, subset
from dit.random import Stream
from storage.errors import InputError

DIMS = 8
REFERENCE = Statistics(10**9, torch.zeros(DIMS).double(), torch.eye(DIMS).double() * (10**9 - 1))
"""Of infinitely many standard normal features."""


def normal(count: int, seed: int, shift: float = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, DIMS)).astype(np.float32) + shift)


def test_a_subset_is_keyed_and_without_repetition() -> None:
    one = subset(0, Stream.FD_SUBSET, 3, 100, 40)
    assert len(set(one.tolist())) == 40
    assert one.tolist() == sorted(one.tolist())
    assert set(one.tolist()) <= set(range(100))
    assert one.tolist() == subset(0, Stream.FD_SUBSET, 3, 100, 40).tolist()
    assert one.tolist() != subset(0, Stream.FD_SUBSET, 4, 100, 40).tolist()
    assert one.tolist() != subset(1, Stream.FD_SUBSET, 3, 100, 40).tolist()
    assert subset(0, Stream.FD_SUBSET, 0, 5, 9).tolist() == [0, 1, 2, 3, 4]


def test_every_item_is_as_likely_in_a_subset() -> None:
    counted = np.bincount(np.concatenate([subset(seed, Stream.FD_SUBSET, 0, 10, 3) for seed in range(500)]))
    assert counted.sum() == 1500
    assert abs(counted - 150).max() < 5 * 150**0.5


def test_infinity_has_little_of_the_bias() -> None:
    sets = [normal(400, seed) for seed in range(12)]
    biased = np.mean([REFERENCE.distance(Statistics.of(features)) for features in sets])
    assert abs(np.mean([fd_infinity(REFERENCE, features, 0) for features in sets])) < 0.2 * biased


def test_infinity_of_an_exact_line_is_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Statistics, "distance", lambda _, other: 2 + 300 / other.count)
    sizes: list[int] = []
    original = Statistics.update
    monkeypatch.setattr(Statistics, "update", lambda s, x: (sizes.append(len(x)), original(s, x))[1])
    assert fd_infinity(REFERENCE, normal(1000, 0), 0) == pytest.approx(2)
    assert (sizes[0], sizes[-1], len(sizes)) == (100, 1000, 15)


def test_every_size_has_a_subset_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[set[int]] = []
    monkeypatch.setattr(resample, "subset", lambda *key: (drawn.append(set((rows := subset(*key)).tolist())), rows)[1])
    fd_infinity(REFERENCE, normal(100, 0), 0)
    assert not drawn[0] <= drawn[1]


def test_few_samples_stay_above_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = Statistics.update
    monkeypatch.setattr(Statistics, "update", lambda s, x: (sizes.append(len(x)), original(s, x))[1])
    fd_infinity(REFERENCE, normal(60, 0), 0)
    assert min(sizes) == 2 * DIMS
    sizes.clear()
    fd_infinity(REFERENCE, normal(11, 0), 0)
    assert min(sizes) == 5


def test_spread_is_that_of_new_samples() -> None:
    truth = np.std([REFERENCE.distance(Statistics.of(normal(400, seed, 0.5))) for seed in range(300)])
    found = np.mean([fd_standard_error(REFERENCE, normal(400, seed, 0.5), 0) for seed in range(8)])
    assert found == pytest.approx(truth, rel=0.25)


def test_keyed_by_the_seed() -> None:
    features = normal(100, 0)
    assert fd_infinity(REFERENCE, features, 0) == fd_infinity(REFERENCE, features, 0)
    assert fd_infinity(REFERENCE, features, 0) != fd_infinity(REFERENCE, features, 1)
    assert fd_standard_error(REFERENCE, features, 0) == fd_standard_error(REFERENCE, features, 0)
    assert fd_standard_error(REFERENCE, features, 0) != fd_standard_error(REFERENCE, features, 1)


def test_too_few_are_refused() -> None:
    with pytest.raises(InputError, match="needs at least 4 samples, not 3"):
        fd_infinity(REFERENCE, normal(3, 0), 0)
    with pytest.raises(InputError, match="at least 2"):
        fd_standard_error(REFERENCE, normal(1, 0), 0)
