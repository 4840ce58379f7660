"""Heun's method for the probability flow of EDM (Karras et al., arXiv 2206.00364, algorithm 1).

A deterministic flow has the same distribution of x at every noise level as adding noise does. With the noise level
sigma itself as time, and the score of equation 3, equation 1 becomes

    dx / dsigma = -sigma grad log p(x; sigma) = (x - D(x; sigma)) / sigma

A step from sigma to the next level is Euler's, x' = x + h d with h < 0 the difference of the levels and d the slope,
corrected by the slope d' at its end: x + h (d + d') / 2. The error of a step is then of order h^3 instead of h^2. The
last step ends at sigma = 0, where the slope is not defined, and so stays Euler's.

Levels are spaced evenly in sigma^(1/rho) (equation 5): a larger rho makes steps near the data shorter.
"""

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
    """Sample, yielding one state a step. No noise is added on the way.

    The network is evaluated twice a step and once in the last: 2 * steps - 1 times.

    Args:
        process: the preconditioning.
        model: the network, possibly guided.
        x: standard normal numbers (B, C, H, W), scaled to sigma_max here; all states have their dtype.
        y: labels (B,), or None.
        steps: number of steps.
        sigma_min: noise level before the last step, which leads to 0.
        sigma_max: noise level at the start.
        rho: larger values make steps shorter near the data.

    Raises:
        InputError: as `noise_levels`.
    """
    sigmas = noise_levels(steps, sigma_min, sigma_max, rho)
    x = float(sigmas[0]) * x
    for step in reversed(range(steps)):
        sigma, sigma_next = sigmas[steps - 1 - step].expand(len(x)), sigmas[steps - step].expand(len(x))
        x0 = process.denoise(model, x, sigma.to(x.device), y)
        slope = (x - x0) / float(sigma[0])
        h = float(sigma_next[0] - sigma[0])
        x_next = x + h * slope
        if step > 0:
            slope_next = (x_next - process.denoise(model, x_next, sigma_next.to(x.device), y)) / float(sigma_next[0])
            x_next = x + h * (slope + slope_next) / 2
        x = x_next
        yield State(step, x, x0)


def noise_levels(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Noise levels (steps + 1,) in float64 from sigma_max to sigma_min, then 0 (equation 5).

    Raises:
        InputError: there are fewer than two steps, or the levels do not decrease to above 0.
    """
    if steps < 2:
        raise InputError(f"steps: Heun's method needs at least 2, not {steps}")
    if not 0 < sigma_min < sigma_max or rho <= 0:
        raise InputError(
            f"noise levels: sigma_max {sigma_max:g}, sigma_min {sigma_min:g} and rho {rho:g} must be above 0, "
            "and sigma_max above sigma_min"
        )
    ramp = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps, dtype=torch.float64)
    return torch.cat([ramp**rho, ramp.new_zeros(1)])
