import numpy as np
import pytest
import torch
from scipy.special import softmax

from dit.metrics.inception_score import InceptionScore
from storage.errors import InputError

ONE_HOT = 50 * torch.eye(100)


def score(logits: torch.Tensor, cuts: int = 777, split: int = 5000) -> float:
    found = InceptionScore(split)
    for batch in logits.split(cuts):
        found.update(batch)
    return found.value()


def by_definition(logits: np.ndarray, split: int) -> float:
    p = softmax(logits.astype(np.float64), axis=1)
    parts = [p[start : start + split] for start in range(0, len(p), split)]
    return float(np.mean([np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in parts]))


def test_closed_forms() -> None:
    assert score(ONE_HOT.tile(100, 1)) == pytest.approx(100, rel=1e-9)
    assert score(ONE_HOT.repeat_interleave(100, 0)) == pytest.approx(50, rel=1e-9)  # half of them in each split
    assert score(torch.zeros(6000, 10)) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("cuts", [1, 7, 40, 97])
def test_any_batching_is_the_definition_with_a_short_last_split(cuts: int) -> None:
    logits = np.random.default_rng(0).normal(size=(97, 6)).astype(np.float32) * 3
    assert score(torch.from_numpy(logits), cuts, split=40) == pytest.approx(by_definition(logits, 40), rel=1e-9)


def test_impossible_classes_count_nothing() -> None:
    assert score(torch.eye(4) * 1e4) == pytest.approx(4)


def test_what_has_no_answer_is_refused() -> None:
    with pytest.raises(InputError, match="no samples"):
        InceptionScore().value()
    with pytest.raises(InputError, match="not finite"):
        InceptionScore().update(torch.tensor([[0, float("inf")]]))
