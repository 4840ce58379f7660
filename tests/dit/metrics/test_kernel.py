import numpy as np
import pytest
import torch

from dit.metrics import kernel
from dit.metrics.kernel import kernel_distance
from storage.errors import InputError


def normal(*shape: int, seed: int = 0, shift: float = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) + np.float32(shift)


def by_definition(x: np.ndarray, y: np.ndarray) -> float:
    def mean(a: np.ndarray, b: np.ndarray, *, same: bool) -> float:
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not same or i != j]
        return float(np.mean([(a[i].astype(float) @ b[j] / a.shape[1] + 1) ** 3 for i, j in pairs]))

    return mean(x, x, same=True) + mean(y, y, same=True) - 2 * mean(x, y, same=False)


@pytest.mark.parametrize("block", [4096, 5])
def test_all_pairs(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(kernel, "BLOCK", block)
    x, y = normal(17, 6), normal(23, 6, seed=1, shift=0.5)
    found = kernel_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(by_definition(x, y), rel=1e-10)


def test_closed_form() -> None:
    x, y = torch.tensor([[1.0], [1]]), torch.tensor([[0.0], [0]])
    assert kernel_distance(x, y) == 8 + 1 - 2


def test_sets_of_one_distribution_are_at_zero_on_average() -> None:
    draws = [normal(2, 50, 4, seed=seed) for seed in range(200)]
    found = [kernel_distance(*map(torch.from_numpy, pair)) for pair in draws]
    assert abs(np.mean(found)) < 3 * np.std(found) / len(found) ** 0.5
    assert min(found) < 0


def test_one_feature_is_too_few() -> None:
    with pytest.raises(InputError, match="needs at least 2 images of each set, not 1 and 2"):
        kernel_distance(torch.ones(1, 3), torch.ones(2, 3))
