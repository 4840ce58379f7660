"""Power-function averages: against integrals of their profiles, and a loop in float64."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from scipy.integrate import quad
from torch import nn

from dit.training import power
from dit.training.config import TrainConfig
from dit.training.ema import EMA
from dit.training.power import Profile
from dit.training.start import decays
from storage.latents import LatentManifest
from storage.seal import json_digest


def profile(at: Profile, step: float) -> float:
    """The definition: (g + 1) s^g / t^(g + 1) up to t."""
    return (at.exponent + 1) * step**at.exponent / at.step ** (at.exponent + 1) if step <= at.step else 0.0


@pytest.mark.parametrize(("width", "exponent"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_published_exponents(width: float, exponent: float) -> None:
    assert power.exponent(width) == pytest.approx(exponent, abs=0.005)


@pytest.mark.parametrize("width", [0.005, 0.01, 0.05, 0.1, 0.2, 0.25, 0.288, 0.2886])
def test_width_and_exponent_are_inverse(width: float) -> None:
    exponent = power.exponent(width)
    assert exponent > 0
    assert power.width(exponent) == pytest.approx(width, rel=1e-9)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 6.94, 16.97])
def test_width_is_the_standard_deviation_of_the_profile(exponent: float) -> None:
    at = Profile(1.0, exponent)
    mass, mean, square = (quad(lambda step, n=n: step**n * profile(at, step), 0, 1)[0] for n in range(3))
    assert mass == pytest.approx(1)
    assert power.width(exponent) == pytest.approx(np.sqrt(square - mean**2))


@pytest.mark.parametrize(
    ("one", "other"), list(product([Profile(3.0, 16.97), Profile(7.0, 6.94)], [Profile(5.0, 6.94), Profile(7.0, 0.3)]))
)
def test_inner_product_is_the_integral(one: Profile, other: Profile) -> None:
    expected, _ = quad(lambda step: profile(one, step) * profile(other, step), 0, min(one.step, other.step))
    assert power.inner_product(one, other) == pytest.approx(expected, rel=1e-9)
    assert power.inner_product(other, one) == power.inner_product(one, other)


def tracked(steps: int, every: int) -> list[Profile]:
    return [Profile(step, power.exponent(width)) for step in range(every, steps + 1, every) for width in (0.05, 0.1)]


@pytest.mark.parametrize("number", [0, 17, 39])
def test_a_tracked_profile_is_combined_of_itself(number: int) -> None:
    profiles = tracked(1000, 50)
    found, error = power.combination(profiles, profiles[number])
    np.testing.assert_allclose(found, np.eye(40)[number], rtol=0, atol=1e-9)
    assert error < 1e-6


def test_coefficients_are_those_of_sampled_profiles() -> None:
    """Against numpy's least squares on a fine grid of steps."""
    profiles, wanted = tracked(1000, 100), Profile(1000, power.exponent(0.075))
    grid = (np.arange(200_000) + 0.5) / 200
    rows = np.array([[profile(at, step) for at in profiles] for step in grid])
    target = np.array([profile(wanted, step) for step in grid])
    expected = np.linalg.lstsq(rows, target)[0]
    found, error = power.combination(profiles, wanted)
    np.testing.assert_allclose(found, expected / expected.sum(), rtol=0, atol=1e-3)
    left = np.linalg.norm(rows @ found - target) / np.linalg.norm(target)
    assert error == pytest.approx(left, rel=1e-2)


@pytest.mark.parametrize(("width", "step", "most"), [(0.075, 1000, 0.005), (0.2, 1000, 0.05), (0.075, 975, 1)])
def test_the_error_says_what_cannot_be_combined(width: float, step: float, most: float) -> None:
    """Well at the step of a snapshot, within a few times the tracked widths; badly in the middle between two."""
    profiles = [at for at in tracked(1000, 50) if at.step <= step]
    _, error = power.combination(profiles, Profile(step, power.exponent(width)))
    assert most / 10 < error < most


def test_the_average_is_a_loop_in_float64_that_skips_what_training_skips() -> None:
    net, widths, skipped = nn.Linear(4, 3), (0.05, 0.1), {0, 7, 8}
    averages = [EMA(net, decay) for decay in list(decays(TrainConfig(ema_power=widths)).values())[1:]]
    expected = [net.weight.detach().double().numpy() for _ in widths]
    rng = np.random.default_rng(0)
    for step in range(40):
        if step not in skipped:
            with torch.no_grad():
                net.weight.add_(torch.from_numpy(rng.standard_normal((3, 4))))
        for number, (average, width) in enumerate(zip(averages, widths, strict=True)):
            average.update(net, step, torch.tensor(step not in skipped))
            if step not in skipped:
                beta = (1 - 1 / (step + 1)) ** (power.exponent(width) + 1)
                expected[number] = beta * expected[number] + (1 - beta) * net.weight.detach().double().numpy()
    for average, reference in zip(averages, expected, strict=True):
        np.testing.assert_allclose(average.state_dict()["weight"].numpy(), reference, rtol=1e-4, atol=1e-5)


def test_after_the_first_step_the_average_is_the_weights() -> None:
    net = nn.Linear(4, 3)
    average = EMA(net, decays(TrainConfig(ema_power=(0.1,)))["power-0.1"])
    with torch.no_grad():
        net.weight.add_(1)
    average.update(net, 0)
    assert torch.equal(average.state_dict()["weight"], net.weight)


def test_decays_add_up_to_the_profile() -> None:
    """What step s counts after t steps: the product of the decays after it times what it was taken with."""
    exponent, steps = power.exponent(0.1), 2000
    decay = np.array([power.decay(exponent, step) for step in range(1, steps + 1)])
    counts = (1 - decay) * np.append(np.cumprod(decay[::-1])[-2::-1], 1)
    assert counts.sum() == pytest.approx(1)
    expected = [profile(Profile(steps, exponent), step + 0.5) for step in range(steps)]
    np.testing.assert_allclose(counts, expected, rtol=0, atol=0.01 * max(expected))


def test_names_and_identity() -> None:
    assert list(decays(TrainConfig(ema_power=(0.05, 0.10)))) == ["ema", "power-0.05", "power-0.1"]
    assert "ema_power" not in TrainConfig().identity()
    assert json_digest(TrainConfig(ema_power=(0.05,)).identity()) != json_digest(TrainConfig().identity())
    for width in (0.0, 0.3):
        with pytest.raises(ValueError, match="ema_power"):
            TrainConfig(ema_power=(width,))


def test_a_killed_run_and_one_that_goes_on_end_in_the_bits_of_a_whole_one(
    tmp_path: Path, latents: LatentManifest
) -> None:
    config = tiny.TRAINING.model_copy(update={"ema_power": (0.05, 0.1)})
    whole = tiny.run_train(tmp_path / "whole", config, latents)
    assert {"model-power-0.05.safetensors", "model-power-0.1.safetensors"} <= whole.card.weights.keys()
    with pytest.raises(tiny.Killed):
        tiny.run_train(tmp_path / "killed", config, latents, tiny.Killer(7))
    tiny.run_train(tmp_path / "longer", config.model_copy(update={"steps": 8}), latents)
    plain = tiny.run_train(tmp_path / "plain", tiny.TRAINING, latents)
    assert {name: plain.card.weights[name] for name in plain.card.weights}.items() <= whole.card.weights.items()
    for root in ("killed", "longer"):
        assert tiny.run_train(tmp_path / root, config, latents).content == whole.content
