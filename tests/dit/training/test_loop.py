import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dit.ranks import Ranks
from dit.training.data import Batch
from dit.training.ema import EMA
from dit.training.loop import StepConfig, TrainState, train


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
    return Batch(scale * ones, ones, torch.zeros(2), None)


def run(step_config: StepConfig, steps: int) -> tuple[list[float], list[float]]:
    """The weight after each step and the norms, with plain gradient descent."""
    model = Line()
    state = TrainState(model, {"ema": EMA(model, 0.9)}, torch.optim.SGD(model.parameters(), lr=1.0, fused=True))
    found = [
        (model.w.item(), result.gradient_norm.item())
        for result in train(state, Slope(), batch, step_config, stop=steps, ranks=Ranks())
    ]
    weights, norms = zip(*found, strict=True)
    return list(weights), list(norms)


def test_learning_rate_is_asked_for_each_step() -> None:
    weights, norms = run(StepConfig(learning_rate=lambda step: 0.1 * (step + 1)), 3)
    assert weights == pytest.approx([2 - 1, 2 - 1 - 2, 2 - 1 - 2 - 3])
    assert norms == pytest.approx([10, 10, 10])


def test_a_long_gradient_is_shortened_and_its_own_norm_reported() -> None:
    weights, norms = run(StepConfig(learning_rate=lambda _: 1.0, gradient_clip=0.5), 2)
    assert weights == pytest.approx([1.5, 1.0])
    assert norms == pytest.approx([10, 10])


def test_a_short_gradient_is_left_alone() -> None:
    weights, _ = run(StepConfig(learning_rate=lambda _: 0.1, gradient_clip=50.0), 1)
    assert weights == pytest.approx([1.0])


def test_micro_batches_add_up_to_the_batch() -> None:
    """Uneven ones too: the last holds what is left."""

    def uneven(step: int) -> Batch:
        x0 = torch.arange(7.0).reshape(7, 1, 1, 1) + step
        return Batch(x0, x0, torch.zeros(7), torch.arange(7))

    def losses(micro_batch: int | None) -> tuple[list[float], list[float], list[int]]:
        model, sizes = Line(), []
        model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
        state = TrainState(model, {"ema": EMA(model, 0.9)}, torch.optim.SGD(model.parameters(), lr=1.0, fused=True))
        step_config = StepConfig(learning_rate=lambda _: 0.1, micro_batch=micro_batch)
        found = [
            (result.terms["loss"].item(), model.w.item())
            for result in train(state, Slope(), uneven, step_config, stop=2, ranks=Ranks())
        ]
        return *map(list, zip(*found, strict=True)), sizes

    whole, weights, sizes = losses(None)
    assert sizes == [7, 7]
    assert whole == pytest.approx([2 * 3, 1.7 * 4])
    for micro_batch, expected in ((1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (100, [7])):
        again, moved, sizes = losses(micro_batch)
        assert sizes == 2 * expected
        assert again == pytest.approx(whole, rel=1e-6)
        assert moved == pytest.approx(weights, rel=1e-6)


def test_a_model_is_told_its_own_rows_and_torchs_generator_is_left_alone() -> None:
    told: list[dict[str, Tensor]] = []

    class Told(Line):
        def forward(self, x: Tensor, t: Tensor, y: Tensor | None, **given: Tensor) -> Tensor:
            told.append(given)
            return self.w * x

    def batch(step: int) -> Batch:
        x0 = torch.ones(4, 1, 1, 1)
        return Batch(x0, x0, torch.zeros(4), None, dropout=torch.arange(4) + 10 * step)

    before = torch.random.get_rng_state()
    model = Told()
    state = TrainState(model, {"ema": EMA(model, 0.9)}, torch.optim.SGD(model.parameters(), lr=1.0, fused=True))
    step_config = StepConfig(learning_rate=lambda _: 0.1, micro_batch=3)
    list(train(state, Slope(), batch, step_config, stop=2, ranks=Ranks()))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [set(given) for given in told] == [{"dropout"}] * 4
    assert [given["dropout"].tolist() for given in told] == [[0, 1, 2], [3], [10, 11, 12], [13]]


def adam(model: nn.Module) -> TrainState:
    return TrainState(model, {"ema": EMA(model, 0.9)}, torch.optim.AdamW(model.parameters(), lr=1.0, fused=True))


def changing(state: TrainState) -> list[Tensor]:
    """All that a step changes."""
    slots = [value for slots in state.optimizer.state.values() for value in slots.values()]
    averages = state.averages["ema"].state_dict().values()
    return [value.clone() for value in (*state.model.parameters(), *averages, *slots)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(bad: float, clip: float | None) -> None:
    """The first step too, before which the optimizer has no moments."""
    scales = [bad, 1.0, bad, bad, 2.0]

    def faulty(step: int) -> Batch:
        ones = torch.ones(4, 1, 1, 1)
        x0 = ones.clone()
        x0[2] *= scales[step]
        return Batch(x0, ones, torch.zeros(4), None)

    state = adam(Line())
    step_config = StepConfig(learning_rate=lambda step: 0.1, gradient_clip=clip, micro_batch=3)
    before, counts = state.model.w.item(), []
    for result in train(state, Slope(), faulty, step_config, stop=5, ranks=Ranks()):
        counts.append((int(result.skipped), int(result.skipped_in_a_row)))
        if result.step == 1:
            assert state.model.w.item() == before
        if result.step == 2:
            once = changing(state)
        if result.step == 4:
            assert all(map(torch.equal, changing(state), once))
    assert counts == [(1, 1), (1, 0), (2, 1), (3, 2), (3, 0)]
    plain = adam(Line())
    list(train(plain, Slope(), lambda step: faulty([1, 4][step]), step_config, stop=2, ranks=Ranks()))
    assert all(map(torch.equal, changing(state), changing(plain)))


def test_losses_by_quartile_of_the_time() -> None:
    def spread(step: int) -> Batch:
        x0 = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0]).reshape(5, 1, 1, 1)
        return Batch(x0, x0, torch.tensor([0.0, 0.2499, 0.25, 0.75, 0.9999], dtype=torch.float64), None)

    model = Line()
    state = TrainState(model, {"ema": EMA(model, 0.9)}, torch.optim.SGD(model.parameters(), lr=1.0, fused=True))
    step_config = StepConfig(learning_rate=lambda _: 0.1, micro_batch=2)
    (result,) = train(state, Slope(), spread, step_config, stop=1, ranks=Ranks())
    found = result.quartiles.tolist()
    assert math.isnan(found[2])
    assert [found[0], found[1], found[3]] == pytest.approx([2 * 1.5, 2 * 3, 2 * 6])
