import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from dit.diffusion.config import DiffusionConfig
from dit.diffusion.gaussian import GaussianDiffusion
from dit.samplers.dpm import dpm, solver_timesteps
from dit.samplers.state import last
from storage.errors import InputError

DIFFUSION = GaussianDiffusion.from_config(DiffusionConfig())


def smooth(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    """A network of noise and variance that depends on noisy data and time."""
    wave = torch.sin(t / 100).reshape(-1, 1, 1, 1)
    return torch.cat([0.9 * x + 0.1 * wave, torch.tanh(x - wave)], 1)


def gaussian(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    """What a perfect network says if the data is N(2, 0.25)."""
    kept = DIFFUSION.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    return (1 - kept).sqrt() * (x - kept.sqrt() * 2) / (kept * 0.25 + 1 - kept)


@pytest.mark.parametrize("steps", [7, 20, 50])
def test_steps_are_those_of_diffusers(steps: int) -> None:
    scheduler = DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    scheduler.betas = torch.from_numpy(np.linspace(1e-4, 0.02, 1000))  # its own tables are float32
    scheduler.alphas_cumprod = (1 - scheduler.betas).cumprod(0)
    scheduler.set_timesteps(steps)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = x
    for state, t in zip(dpm(DIFFUSION, smooth, x, None, steps=steps), scheduler.timesteps, strict=True):
        output = smooth(expected, torch.tensor([int(t)] * 2), None)[:, :4]
        expected = scheduler.step(output, t, expected).prev_sample
        torch.testing.assert_close(state.x, expected, rtol=2e-5, atol=2e-5)


def exact(noise: Tensor, timestep: int) -> Tensor:
    """Where the flow is at a timestep: as many standard deviations from the mean as at the start."""
    kept = float(DIFFUSION.alphas_cumprod[timestep])
    return kept**0.5 * 2 + (1 - 0.75 * kept) ** 0.5 * noise


def test_the_error_falls_with_the_square_of_the_steps() -> None:
    noise = torch.linspace(-3, 3, 64, dtype=torch.float64).reshape(64, 1, 1, 1)
    errors = []
    for steps in (20, 40, 80, 160):
        states = {state.step: state.x for state in dpm(DIFFUSION, gaussian, exact(noise, 999), None, steps=steps)}
        errors.append(float((states[steps // 4] - exact(noise, 250)).abs().max()))
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert orders == pytest.approx([2, 2, 2], abs=0.3)


def test_samples_have_mean_and_deviation_of_the_data() -> None:
    noise = torch.linspace(-3, 3, 64, dtype=torch.float64).reshape(64, 1, 1, 1)
    found = last(dpm(DIFFUSION, gaussian, noise, None, steps=50))
    torch.testing.assert_close(found, 2 + 0.5 * noise, rtol=0, atol=0.03)


def test_states_count_down_to_the_expected_data() -> None:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    states = list(dpm(DIFFUSION, smooth, x, None, steps=5))
    assert [state.step for state in states] == [4, 3, 2, 1, 0]
    assert torch.equal(states[-1].x, states[-1].x0)
    assert states[-1].x.dtype == torch.float32


def test_timesteps_are_those_of_diffusers() -> None:
    scheduler = DPMSolverMultistepScheduler()
    for steps in range(2, 1000):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == solver_timesteps(1000, steps)


@pytest.mark.parametrize("steps", [1, 1000])
def test_a_number_of_steps_that_does_not_fit(steps: int) -> None:
    with pytest.raises(InputError, match=rf"sample.steps: dpm\+\+ takes 2 to 999 steps .* not {steps}"):
        solver_timesteps(1000, steps)
