import numpy as np
import pytest
import torch

from dit.metrics import precision_recall as module
from dit.metrics.precision_recall import Mode, precision_recall
from storage.errors import InputError

MODES: tuple[Mode, ...] = ("adm-fp16", "fp32")


def normal(*shape: int, seed: int = 0, scale: float = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32) * scale)


def dense(reference: torch.Tensor, samples: torch.Tensor, dtype: type = np.float64) -> tuple[float, float]:
    """Everything at once, from differences and not from products."""
    a, b = reference.numpy().astype(dtype), samples.numpy().astype(dtype)

    def squared(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return ((u[:, None].astype(np.float64) - v[None]) ** 2).sum(2)

    def radii(u: np.ndarray) -> np.ndarray:
        return np.sort(squared(u, u), axis=1)[:, 3]

    between = squared(a, b)
    precision = (between <= radii(a)[:, None]).any(0).mean()
    return float(precision), float((between <= radii(b)[None]).any(1).mean())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block", [10_000, 3])
def test_one_dimension(mode: Mode, block: int) -> None:
    """The square of 300 has no place in float16, so this is the way around an overflow too."""
    reference, samples = torch.arange(10.0)[:, None], torch.tensor([0.5, 4.5, 100, 200, 300])[:, None]
    assert precision_recall(reference, samples, mode, block) == (0.4, 1.0)


@pytest.mark.parametrize("block", [10_000, 50, 7])
def test_blocks_are_the_dense_computation(block: int) -> None:
    reference, samples = normal(120, 5), normal(150, 5, seed=1) + 0.7
    expected = dense(reference, samples)
    assert 0.1 < min(expected) < max(expected) < 0.9
    assert precision_recall(reference, samples, "fp32", block) == expected


def test_float16_is_near_but_rounds() -> None:
    reference, samples = normal(400, 16), normal(400, 16, seed=1, scale=1.1)
    exact, rounded = (precision_recall(reference, samples, mode) for mode in ("fp32", "adm-fp16"))
    assert rounded == pytest.approx(exact, abs=0.02)
    assert rounded != exact


def test_float16_rounds_the_features_the_norms_the_products_and_the_sums() -> None:
    u, v = normal(9, 33), normal(8, 33, seed=1)
    a, b = u.numpy().astype(np.float16), v.numpy().astype(np.float16)
    norms = [np.square(x).astype(np.float32).sum(1).astype(np.float16) for x in (a, b)]
    products = (a.astype(np.float32) @ b.astype(np.float32).T).astype(np.float16)
    expected = norms[0][:, None] - np.float16(2) * products + norms[1]
    assert expected.dtype == np.float16
    np.testing.assert_allclose(module._distances(u, v, "adm-fp16").numpy(), expected, rtol=2e-3)


def test_only_the_block_with_an_overflow_is_exact() -> None:
    u = normal(6, 40)
    big = 100 * normal(6, 40, seed=1)
    exact = ((u[:, None] - big[None]).double() ** 2).sum(2)
    assert torch.equal(module._distances(u, u, "adm-fp16"), module._distances(u, u, "adm-fp16").half().float())
    torch.testing.assert_close(module._distances(u, big, "adm-fp16").double(), exact, rtol=1e-5, atol=0)


def test_a_product_alone_that_overflows_is_noticed() -> None:
    u = torch.full((4, 10), 65.0)
    assert float(module._distances(u, u + 1, "adm-fp16")[0, 0]) == pytest.approx(10, abs=0.1)


@pytest.mark.parametrize("mode", MODES)
def test_mode_collapse_is_precise_and_recalls_little(mode: Mode) -> None:
    reference = normal(1000, 8)
    collapsed = reference[:5].repeat(100, 1) + normal(500, 8, seed=1, scale=0.1)
    precision, recall = precision_recall(reference, collapsed, mode)
    assert precision > 0.8
    assert recall < 0.3


@pytest.mark.parametrize("mode", MODES)
def test_the_surface_belongs_to_the_ball(mode: Mode) -> None:
    reference = torch.tensor([[0.0], [1], [2], [3]])
    assert precision_recall(reference, torch.tensor([[6.0], [6.5], [7], [7.5]]), mode)[0] == 0.25


@pytest.mark.parametrize("mode", MODES)
def test_the_surface_belongs_to_the_ball_of_a_sample_too(mode: Mode) -> None:
    samples = torch.tensor([[0.0], [1], [2], [3]])
    assert precision_recall(torch.tensor([[6.0], [6.5], [7], [7.5]]), samples, mode)[1] == 0.25


@pytest.mark.parametrize(("reference", "samples"), [(3, 9), (9, 3)])
def test_too_few_are_refused(reference: int, samples: int) -> None:
    with pytest.raises(InputError, match=f"at least 4 reference images.*, not {reference} and {samples}"):
        precision_recall(normal(reference, 2), normal(samples, 2), "fp32")
