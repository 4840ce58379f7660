import numpy as np
import pytest
import torch
from scipy import linalg

from dit.metrics.frechet import Statistics, frechet_distance
from storage.errors import InputError


def diagonal(*values: float) -> torch.Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def zero_mean(s1: torch.Tensor, s2: torch.Tensor) -> float:
    zero = torch.zeros(len(s1), dtype=torch.float64)
    return frechet_distance(zero, s1, zero, s2)


def test_closed_forms() -> None:
    gap = torch.tensor([1.0, 2, 3], dtype=torch.float64)
    assert frechet_distance(gap, diagonal(1, 4, 9), 0 * gap, diagonal(4, 9, 16)) == pytest.approx(17, rel=1e-12)
    assert zero_mean(torch.eye(8), 4 * torch.eye(8)) == pytest.approx(8, rel=1e-12)
    coupled = torch.tensor([[2.0, 1], [1, 2]], dtype=torch.float64)
    assert zero_mean(coupled, diagonal(1, 3)) == pytest.approx(0.51668522645, abs=1e-10)
    assert zero_mean(coupled, coupled) == pytest.approx(0, abs=1e-12)


def test_low_rank() -> None:
    assert zero_mean(diagonal(1, 0), diagonal(0, 1)) == pytest.approx(2, abs=1e-7)
    assert zero_mean(diagonal(0, 0), diagonal(4, 9)) == pytest.approx(13, abs=1e-7)
    rng = np.random.default_rng(1)
    few, many = torch.from_numpy(rng.normal(size=(5, 12))), torch.from_numpy(rng.normal(size=(50, 12)))
    a, b = Statistics.of(few), Statistics.of(many)
    assert a.distance(a) == pytest.approx(0, abs=1e-6)
    assert a.distance(b) == pytest.approx(b.distance(a), rel=1e-6)


def test_random_features() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 7))
    y = 1.5 * rng.normal(size=(120, 7)) + 0.3
    found = Statistics.of(torch.from_numpy(x)).distance(Statistics.of(torch.from_numpy(y)))
    assert found == pytest.approx(2.780661776982, abs=1e-11)
    sx, sy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.trace(linalg.sqrtm(sx @ sy)).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(sx + sy) - 2 * root
    assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("cuts", [[300], [1] * 300, [7, 0, 130, 163], [299, 1]])
def test_streaming_is_numpy_for_any_batching(cuts: list[int]) -> None:
    x = torch.from_numpy(np.random.default_rng(2).normal(size=(300, 6)))
    found = Statistics.empty(6)
    for part in x.split(cuts):
        found = found.update(part)
    assert found.count == 300
    np.testing.assert_allclose(found.mean.numpy(), x.numpy().mean(0), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(found.covariance.numpy(), np.cov(x.numpy(), rowvar=False), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_merging_is_numpy_for_any_rank_split(ranks: int, offset: float) -> None:
    x = torch.from_numpy(np.random.default_rng(3).normal(size=(300, 6)) + offset)
    parts = [Statistics.of(x[rank::ranks][:20]).update(x[rank::ranks][20:]) for rank in range(ranks)]
    found = Statistics.empty(6)
    for part in parts:
        found = found.merge(part)
    np.testing.assert_allclose(found.mean.numpy(), x.numpy().mean(0), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(found.covariance.diag().numpy(), x.numpy().var(0, ddof=1), rtol=1e-9)
    if not offset:
        expected = np.cov(x.numpy(), rowvar=False)
        np.testing.assert_allclose(found.covariance.numpy(), expected, rtol=1e-12, atol=1e-14)


def test_float32_features_are_summed_in_float64() -> None:
    x = torch.from_numpy(np.random.default_rng(4).normal(size=(200, 3)).astype(np.float32) + np.float32(1e3))
    expected = np.cov(x.numpy().astype(np.float64), rowvar=False)
    np.testing.assert_allclose(Statistics.of(x).covariance.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_what_has_no_answer_is_refused() -> None:
    one = Statistics.of(torch.ones(1, 3))
    with pytest.raises(InputError, match="at least 2"):
        _ = one.covariance
    with pytest.raises(InputError, match="not finite"):
        Statistics.of(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(InputError, match="different dimensions, 3 and 2"):
        Statistics.of(torch.eye(3)).distance(Statistics.of(torch.eye(2)))
