"""The learning rate and the average's half-life, in steps and in images."""

import pytest
import tiny
from pydantic import ValidationError

from dit.training.config import TrainConfig
from dit.training.start import decays, learning_rate


def test_the_learning_rate_warms_up() -> None:
    config = tiny.TRAINING.model_copy(update={"learning_rate": 0.3, "warmup_steps": 3})
    assert [learning_rate(config, step) for step in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3])
    assert learning_rate(tiny.TRAINING, 0) == tiny.TRAINING.learning_rate


def test_a_warm_up_in_images_is_as_long_for_any_batch_size() -> None:
    config = TrainConfig.model_validate({"batch_size": 8, "learning_rate": 0.5, "warmup_images": 20, "steps": 6})
    assert [learning_rate(config, step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.5, 0.5])
    larger = config.model_copy(update={"batch_size": 16})
    assert [learning_rate(larger, step) for step in range(3)] == pytest.approx([0.4, 0.5, 0.5])
    falling = config.model_copy(update={"decay": "linear"})
    assert [learning_rate(falling, step) for step in (2, 3, 5)] == pytest.approx([0.5, 0.5 * 3 / 3.5, 0.5 / 3.5])


@pytest.mark.parametrize("batch_size", [256, 512])
def test_a_half_life_in_images_is_as_long_for_any_batch_size(batch_size: int) -> None:
    config = TrainConfig(batch_size=batch_size, ema_halflife_images=500_000, ema_decays=(0.9,))
    steps = 500_000 / batch_size
    assert decays(config)["ema"] ** steps == pytest.approx(0.5)
    assert decays(config)["ema-0.9"] == 0.9


@pytest.mark.parametrize(
    ("images", "steps"), [("warmup_images", {"warmup_steps": 5}), ("ema_halflife_images", {"ema_decay": 0.99})]
)
def test_the_same_in_steps_and_in_images_is_refused(images: str, steps: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=f"{images}: takes the place of {next(iter(steps))}, which must be left"):
        TrainConfig.model_validate({images: 500, **steps})


@pytest.mark.parametrize(
    ("decay", "rates"), [("linear", [1, 0.75, 0.5, 0.25]), ("cosine", [1, 0.8535534, 0.5, 0.1464466])]
)
def test_the_learning_rate_falls_behind_the_warm_up(decay: str, rates: list[float]) -> None:
    changes = {"learning_rate": 1.0, "warmup_steps": 2, "steps": 6, "decay": decay}
    config = tiny.TRAINING.model_copy(update=changes)
    assert [learning_rate(config, step) for step in range(6)] == pytest.approx([0.5, 1, *rates])


def test_the_learning_rate_falls_to_a_share_of_its_peak() -> None:
    config = tiny.TRAINING.model_copy(update={"learning_rate": 2.0, "steps": 4, "decay": "linear", "decay_to": 0.2})
    assert [learning_rate(config, step) for step in range(5)] == pytest.approx([2.0, 1.6, 1.2, 0.8, 0.4])
