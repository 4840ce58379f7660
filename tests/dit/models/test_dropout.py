import numpy as np
import pytest
import torch

from dit.models.dropout import keyed_dropout
from dit.random import Stream, words
from storage.order import splitmix64

WORDS = torch.from_numpy(words(0, Stream.DROPOUT, 0, range(64), 1)[:, 0].view(np.int64))


def kept(keys: torch.Tensor, probability: float, site: int = 0, shape: tuple[int, ...] = (8, 16, 16)) -> torch.Tensor:
    return keyed_dropout(torch.ones(len(keys), *shape), keys, site, probability) != 0


def by_numpy(key: int, site: int, count: int, probability: float) -> np.ndarray:
    """The mask of one sample in unsigned words."""
    word = splitmix64(np.array([key ^ site], np.int64).view(np.uint64) - np.uint64(0x9E3779B97F4A7C15))[0]
    low, high = np.uint32(word & np.uint64(0xFFFFFFFF)), np.uint32(word >> np.uint64(32))
    z = (np.arange(count, dtype=np.uint32) ^ low) * np.uint32(0x7FEB352D)
    z = ((z ^ (z >> np.uint32(16))) + high) * np.uint32(0x846CA68B)
    z = (z ^ (z >> np.uint32(15))) * np.uint32(0x9E3779B1)
    return (z / 2.0**32) >= probability


@pytest.mark.parametrize("site", [0, 1, 40])
def test_the_hash_is_that_of_unsigned_words(site: int) -> None:
    for key in (0, 1, -1, int(WORDS[3])):
        found = kept(torch.tensor([key]), 0.25, site).flatten().numpy()
        assert np.array_equal(found, by_numpy(key, site, found.size, 0.25))


@pytest.mark.parametrize("probability", [0.05, 0.13, 0.5, 0.9])
def test_so_many_are_dropped_of_each_sample_and_at_each_place(probability: float) -> None:
    mask = kept(WORDS, probability).double()
    spread = (probability * (1 - probability)) ** 0.5
    count = mask[0].numel()
    assert ((mask.flatten(1).mean(1) - (1 - probability)).abs() < 5 * spread / count**0.5).all()
    assert ((mask.mean(0) - (1 - probability)).abs() < 6 * spread / len(WORDS) ** 0.5).all()
    dropped = keyed_dropout(torch.full((64, 2048), 3.0), WORDS, 0, probability)
    assert float(dropped.max()) == pytest.approx(3 / (1 - probability))


def test_masks_are_independent_of_each_other() -> None:
    """Of samples, sites, steps of the key by one, and neighbouring places."""
    count, shape = 64, (1 << 12,)
    sites = [kept(WORDS, 0.5, site, shape) for site in (0, 1, 2)]
    near = [kept(torch.arange(count) + at, 0.5, 0, shape) for at in (0, 64)]
    masks = torch.cat([*sites, *near]).double() * 2 - 1
    correlation = masks @ masks.T / shape[0]
    correlation.fill_diagonal_(0)
    assert float(correlation.abs().max()) < 6 / shape[0] ** 0.5
    for lag in (1, 2, 16, 256):
        assert abs(float((masks[:, lag:] * masks[:, :-lag]).mean())) < 5 / masks.numel() ** 0.5


def test_a_mask_belongs_to_the_sample_wherever_it_stands() -> None:
    whole = kept(WORDS, 0.3)
    assert torch.equal(torch.cat([kept(part, 0.3) for part in WORDS.split(24)]), whole)
    assert torch.equal(kept(WORDS.flip(0), 0.3), whole.flip(0))


def test_none_is_dropped_without_keys_or_probability_and_gradients_follow_the_mask() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    assert keyed_dropout(x, None, 0, 0.5) is x
    assert keyed_dropout(x, WORDS[:3], 0, 0.0) is x
    keyed_dropout(x, WORDS[:3], 0, 0.5).sum().backward()
    assert torch.equal(x.grad, 2.0 * kept(WORDS[:3], 0.5, shape=(5,)))
    half = keyed_dropout(torch.ones(3, 5, dtype=torch.bfloat16), WORDS[:3], 0, 0.5)
    assert half.dtype == torch.bfloat16
