"""Ancestral sampling (DDPM: Ho et al., arXiv 2006.11239, algorithm 2).

Starting from pure noise, each step draws x_{t-1} from the Gaussian that the network predicts:

    x_{t-1} = mean_t(x_t) + sqrt(var_t) z,    z ~ N(0, I), and z = 0 in the last step

The mean is that of the posterior q(x_{t-1} | x_t, x_0) with the expected data for x_0 (equations 6 and 7), and the
variance is learned (see `dit.diffusion.gaussian`).
"""

# B = batch, C = channels, H, W = height and width

from collections.abc import Iterator

import torch
from torch import Tensor

from dit.diffusion.gaussian import GaussianDiffusion
from dit.diffusion.process import Denoiser
from dit.samplers.state import State, StepNoise


@torch.no_grad()
def ddpm(process: GaussianDiffusion, model: Denoiser, x: Tensor, y: Tensor | None, noise: StepNoise) -> Iterator[State]:
    """Sample, yielding one state a step. The expected data is not clipped, and the last step adds no noise.

    Args:
        process: the process, respaced to the number of steps.
        model: the network, possibly guided.
        x: standard normal numbers (B, C, H, W).
        y: labels (B,), or None.
        noise: called once a step with its index, from ``len(process) - 1`` down to 1.
    """
    for step in reversed(range(len(process))):
        t = torch.full((len(x),), step, device=x.device)
        predicted = process.predict(model(x, process.timesteps.to(x.device)[t], y), x, t)
        x = predicted.mean
        if step > 0:
            x = x + torch.exp(0.5 * predicted.log_variance) * noise(step)
        yield State(step, x, predicted.x0)
