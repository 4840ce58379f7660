"""Heun's second-order method for the probability-flow equation (Karras et al., arXiv 2206.00364, algorithm 1)."""

# B = batch, C = channels, H, W = height and width, sigma = standard deviation of the noise

from collections.abc import Iterator

import torch
from torch import Tensor

from dit.diffusion.edm import EDM
from dit.diffusion.process import Denoiser
from dit.samplers.state import State
from storage.errors import InputError


@torch.no_grad()
def heun(
    process: EDM,
    model: Denoiser,
    x: Tensor,
    y: Tensor | None,
    *,
    steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Iterator[State]:
    """Walk from noise to samples, one state a step, without drawing any noise.

    The network is evaluated twice a step and once in the last: 2 * steps - 1 times.

    Args:
        process: the preconditioning.
        model: the network, possibly guided.
        x: standard normal numbers (B, C, H, W), scaled here; their dtype is that of the walk.
        y: labels (B,), or None.
        steps: number of steps.
        sigma_min: noise level before the last step, which leads to 0.
        sigma_max: noise level of the start.
        rho: how much shorter steps are near the data.

    Raises:
        InputError: the levels do not fall.
    """
    sigmas = noise_levels(steps, sigma_min, sigma_max, rho)
    x = float(sigmas[0]) * x
    for step in reversed(range(steps)):
        here, there = sigmas[steps - 1 - step].expand(len(x)), sigmas[steps - step].expand(len(x))
        x0 = process.denoise(model, x, here.to(x.device), y)
        slope = (x - x0) / float(here[0])
        length = float(there[0] - here[0])
        after = x + length * slope
        if step > 0:
            again = (after - process.denoise(model, after, there.to(x.device), y)) / float(there[0])
            after = x + length * (slope + again) / 2
        x = after
        yield State(step, x, x0)


def noise_levels(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Noise levels (steps + 1,) in float64 from sigma_max to sigma_min, then 0 (equation 5).

    Raises:
        InputError: there are fewer than two steps, or the levels do not fall.
    """
    if steps < 2:
        raise InputError(f"steps {steps}: Heun's method needs at least 2")
    if not 0 < sigma_min < sigma_max or rho <= 0:
        raise InputError(f"noise levels from {sigma_max:g} to {sigma_min:g}, rho {rho:g}: must fall and be above 0")
    ramp = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps, dtype=torch.float64)
    return torch.cat([ramp**rho, ramp.new_zeros(1)])
