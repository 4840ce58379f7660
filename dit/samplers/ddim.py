"""Denoising diffusion implicit models (Song et al., arXiv 2010.02502)."""

# B = batch, C = channels, H, W = height and width

from collections.abc import Iterator

import torch
from torch import Tensor

from dit.diffusion.gaussian import GaussianDiffusion
from dit.diffusion.process import Denoiser
from dit.samplers.state import State, StepNoise


@torch.no_grad()
def ddim(
    process: GaussianDiffusion,
    model: Denoiser,
    x: Tensor,
    y: Tensor | None,
    noise: StepNoise,
    *,
    eta: float = 0.0,
) -> Iterator[State]:
    """Walk from noise to samples, one state a step (equations 12 and 16). The learned variance is not used.

    Args:
        process: the process, already respaced to the steps to take.
        model: the network, possibly guided.
        x: standard normal numbers (B, C, H, W).
        y: labels (B,), or None.
        noise: called with the index of each step but 0, and only if eta is above 0.
        eta: share of the ancestral noise; 0 is deterministic.
    """
    for step in reversed(range(len(process))):
        t = torch.full((len(x),), step, device=x.device)
        predicted = process.predict(model(x, process.timesteps.to(x.device)[t], y), x, t)
        kept = float(process.alphas_cumprod_prev[step])
        variance = eta**2 * float(process.posterior_variance[step])
        x = kept**0.5 * predicted.x0 + max(1 - kept - variance, 0.0) ** 0.5 * predicted.eps
        if variance > 0:
            x = x + variance**0.5 * noise(step)
        yield State(step, x, predicted.x0)
