from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dit.ranks import Ranks
from dit.training.data import Batch
from dit.training.ema import EMA
from dit.training.loop import Numbers, TrainState, train


class Line(nn.Module):
    """w x, with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return self.w * x


class Slope:
    """A process whose loss is the model's output: the gradient is the data's mean."""

    def sample_t(self, u: Tensor) -> Tensor:
        return u

    def training_terms(
        self, model: Callable[..., Tensor], x0: Tensor, noise: Tensor, t: Tensor, y: Tensor | None
    ) -> dict[str, Tensor]:
        return {"loss": model(x0, t, y).flatten(1).mean(1)}


def batch(step: int, scale: float = 10.0) -> Batch:
    ones = torch.ones(2, 1, 1, 1)
    return Batch(scale * ones, ones, torch.zeros(2), None, seed=step)


def run(numbers: Numbers, steps: int) -> tuple[list[float], list[float]]:
    """The weight after each step and the norms, with plain gradient descent."""
    model = Line()
    state = TrainState(model, EMA(model, 0.9), torch.optim.SGD(model.parameters(), lr=1.0))
    found = [
        (model.w.item(), result.gradient_norm.item())
        for result in train(state, Slope(), batch, numbers, stop=steps, ranks=Ranks())
    ]
    weights, norms = zip(*found, strict=True)
    return list(weights), list(norms)


def test_learning_rate_is_asked_for_each_step() -> None:
    weights, norms = run(Numbers(learning_rate=lambda step: 0.1 * (step + 1)), 3)
    assert weights == pytest.approx([2 - 1, 2 - 1 - 2, 2 - 1 - 2 - 3])
    assert norms == pytest.approx([10, 10, 10])


def test_a_long_gradient_is_shortened_and_its_own_norm_reported() -> None:
    weights, norms = run(Numbers(learning_rate=lambda _: 1.0, gradient_clip=0.5), 2)
    assert weights == pytest.approx([1.5, 1.0])
    assert norms == pytest.approx([10, 10])


def test_a_short_gradient_is_left_alone() -> None:
    weights, _ = run(Numbers(learning_rate=lambda _: 0.1, gradient_clip=50.0), 1)
    assert weights == pytest.approx([1.0])


def test_what_draws_from_torch_draws_by_the_batches_seed_and_disturbs_nobody() -> None:
    drawn = []

    class Noisy(Line):
        def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            drawn.append(torch.rand(()).item())
            return self.w * x

    before = torch.random.get_rng_state()
    for _ in range(2):
        model = Noisy()
        state = TrainState(model, EMA(model, 0.9), torch.optim.SGD(model.parameters(), lr=1.0))
        list(train(state, Slope(), batch, Numbers(learning_rate=lambda _: 0.1), stop=2, ranks=Ranks()))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert drawn[:2] == drawn[2:]
    assert drawn[0] != drawn[1]
