"""DPM-Solver++(2M) for the probability flow of DDPM (Lu et al., arXiv 2211.01095, algorithm 2).

With alpha = sqrt(abar), sigma = sqrt(1 - abar) and half the logarithm of the signal-to-noise ratio as time,
lambda = log(alpha / sigma), the flow from s to t has an exact solution (equation 8) in which only the expected data
x0 is unknown:

    x_t = sigma_t / sigma_s x_s + sigma_t  integral of e^lambda x0(lambda) from lambda_s to lambda_t

An x0 that is constant, or linear in lambda, over the step leaves an integral in closed form. With h = lambda_t -
lambda_s, and the constant taken from the line through x0 at s and at the step before (of length h'), half a step ahead:

    x_t = sigma_t / sigma_s x_s + alpha_t (1 - e^-h) D,    D = x0_s + h / (2 h') (x0_s - x0_before)

This is of second order with one pass of the network a step. The first step knows no step before, and the last one
ends at sigma = 0, where h is infinite: both take D = x0_s, so the last result is the expected data.
"""

# B = batch, C = channels, H, W = height and width

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dit.diffusion.gaussian import GaussianDiffusion
from dit.diffusion.process import Denoiser
from dit.samplers.state import State
from storage.errors import InputError


def solver_timesteps(total: int, steps: int) -> list[int]:
    """Where the network is evaluated, falling: ``steps`` of ``steps + 1`` even points from ``total - 1`` to 0.

    Timestep 0 is left out, since the last step goes from the point before it to the data.

    Raises:
        InputError: the process has too few timesteps.
    """
    if not 2 <= steps < total:
        raise InputError(f"sample.steps: dpm++ takes 2 to {total - 1} steps through {total} timesteps, not {steps}")
    points: list[int] = np.linspace(0, total - 1, steps + 1).round().astype(int).tolist()  # as diffusers rounds halves
    return points[:0:-1]


@torch.no_grad()
def dpm(process: GaussianDiffusion, model: Denoiser, x: Tensor, y: Tensor | None, *, steps: int) -> Iterator[State]:
    """Sample, yielding one state a step. No noise is added, and the learned variance is not used.

    Args:
        process: the full process, not a respaced one.
        model: the network, possibly guided.
        x: standard normal numbers (B, C, H, W); all states have their dtype.
        y: labels (B,), or None.
        steps: number of steps, each one pass of the network.

    Raises:
        InputError: as `solver_timesteps`.
    """
    timesteps = solver_timesteps(len(process), steps)
    abars = [float(process.alphas_cumprod[timestep]) for timestep in timesteps] + [1.0]
    before: Tensor | None = None
    h_before = math.inf
    for step in reversed(range(steps)):
        abar, abar_next = abars[-2 - step], abars[-1 - step]
        t = torch.full((len(x),), timesteps[-1 - step], device=x.device)
        x0 = process.predict(model(x, process.timesteps.to(x.device)[t], y), x, t).x0
        h = _lambda(abar_next) - _lambda(abar)
        ahead = x0 if before is None or step == 0 else x0 + h / (2 * h_before) * (x0 - before)
        x = math.sqrt((1 - abar_next) / (1 - abar)) * x - math.sqrt(abar_next) * math.expm1(-h) * ahead
        before, h_before = x0, h
        yield State(step, x, x0)


def _lambda(abar: float) -> float:
    return (math.log(abar) - math.log1p(-abar)) / 2 if abar < 1 else math.inf
