"""Samplers of flows on a grid: against closed forms, plain loops and diffusers."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from dit.diffusion.config import FlowConfig
from dit.diffusion.flow import Flow
from dit.samplers.flow import euler, times
from dit.samplers.state import last
from storage.errors import InputError

MEAN, DEVIATION = 2.0, 0.5
"""Of the Gaussian data, whose flow is known in closed form."""


def flow(path: str = "linear", predict: str = "velocity") -> Flow:
    return Flow.from_config(FlowConfig.model_validate({"path": path, "predict": predict}))


def column(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)


class Exact:
    """What a perfect network says of Gaussian data; remembers the times that it was asked for."""

    def __init__(self, process: Flow) -> None:
        self.process = process
        self.times: list[float] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        self.times.append(float(t[0]))
        process = self.process
        alpha, sigma = column(process.alpha(t)), column(process.sigma(t))
        x0 = MEAN + alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2) * (x - alpha * MEAN)
        noise = sigma / (alpha**2 * DEVIATION**2 + sigma**2) * (x - alpha * MEAN)
        velocity = column(process.alpha_prime(t)) * x0 + column(process.sigma_prime(t)) * noise
        return {"velocity": velocity, "noise": noise, "data": x0}[process.config.predict]


def smooth(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    """A network of more channels than the data has, that depends on noisy data and time."""
    wave = torch.sin(5 * t).reshape(-1, 1, 1, 1)
    return torch.cat([0.7 * torch.tanh(x) + 0.3 * wave, x - wave], 1)


def start() -> Tensor:
    return torch.linspace(-3, 3, 64, dtype=torch.float64).reshape(64, 1, 1, 1)


def errors(sampler: Any, process: Flow, steps: tuple[int, ...]) -> list[float]:
    """Distance from the end of the exact flow, which keeps the number of deviations from the mean."""
    alpha, sigma = process.alpha(torch.tensor(process.bounds[0])), process.sigma(torch.tensor(process.bounds[0]))
    noise = alpha * MEAN + (alpha**2 * DEVIATION**2 + sigma**2).sqrt() * start()
    found = (last(sampler(process, Exact(process), noise, None, steps=n)) for n in steps)
    return [float((x - MEAN - DEVIATION * start()).abs().max()) for x in found]


@pytest.mark.parametrize("predict", ["velocity", "noise", "data"])
@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_the_error_of_euler_falls_with_the_steps(path: str, predict: str) -> None:
    found = errors(euler, flow(path, predict), (40, 80, 160, 320))
    assert [math.log2(coarse / fine) for coarse, fine in pairwise(found)] == pytest.approx([1, 1, 1], abs=0.15)
    assert found[-1] < 0.02


@pytest.mark.parametrize("shift", [1.0, 0.3])
def test_euler_steps_are_those_of_diffusers(shift: float) -> None:
    """Its time is 1 at the noise, its sigma, so its shift is the inverse of ours."""
    steps = 10
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1 / shift)
    scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    expected, grid = x, times(flow(), steps, shift=shift)
    for state, t in zip(euler(flow(), smooth, x, None, steps=steps, shift=shift), scheduler.timesteps, strict=True):
        now = 1 - t / 1000
        assert float(now) == pytest.approx(float(grid[steps - 1 - state.step]), abs=1e-6)
        velocity = smooth(expected, now.repeat(2), None)[:, :4]
        expected = scheduler.step(-velocity, t, expected).prev_sample
        torch.testing.assert_close(state.x, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("predict", ["velocity", "noise", "data"])
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_networks_are_evaluated_within_the_bounds(path: str, predict: str) -> None:
    process = flow(path, predict)
    model = Exact(process)
    states = list(euler(process, model, start().float(), None, steps=50))
    first, final = process.bounds
    assert len(model.times) == 50
    assert first - 1e-7 <= min(model.times) < max(model.times) <= final
    assert torch.equal(states[-1].x, states[-1].x0)
    assert states[-1].x.dtype == torch.float32
    torch.testing.assert_close(states[-1].x.double(), MEAN + DEVIATION * start(), rtol=0, atol=0.2)


def test_steps_that_begin_outside_the_bounds_are_refused() -> None:
    assert len(times(flow(), 5000)) == 5001
    with pytest.raises(InputError, match=r"sample.steps: the last of 1200 begins at t = 0.99917, .* up to 0.999; take"):
        times(flow(predict="data"), 1200)


def test_a_shift_below_1_shortens_the_steps_near_the_noise() -> None:
    grid = times(flow(), 4, shift=0.3)
    assert grid.tolist() == pytest.approx([0, 0.3 / 3.3, 0.3 / 1.3, 0.9 / 1.9, 1])
    assert times(flow(), 4).tolist() == [0, 0.25, 0.5, 0.75, 1]
