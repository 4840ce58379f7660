"""Implicit sampling (DDIM: Song et al., arXiv 2010.02502).

The training loss depends on the marginals q(x_t | x_0) alone, and many processes have those of DDPM. One for each
sigma_t goes back by x_0 and eps as the network expects them in x_t (equation 12, with abar for the paper's alpha):

    x_{t-1} = sqrt(abar_{t-1}) x_0 + sqrt(1 - abar_{t-1} - sigma_t^2) eps + sigma_t z,    z ~ N(0, I)
    sigma_t^2 = eta^2 (1 - abar_{t-1}) / (1 - abar_t) (1 - abar_t / abar_{t-1})           (equation 16)
              = eta^2 btilde_t, the posterior variance of DDPM

At eta = 1 this is DDPM with the posterior variance. At eta = 0 no noise is added: the initial noise determines the
sample, and fewer steps suffice.
"""

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
    """Sample, yielding one state a step. The learned variance is not used.

    Args:
        process: the process, respaced to the number of steps.
        model: the network, possibly guided.
        x: standard normal numbers (B, C, H, W).
        y: labels (B,), or None.
        noise: called with the index of each step but 0, and only if eta is above 0.
        eta: share of the ancestral noise; 0 is deterministic.
    """
    for step in reversed(range(len(process))):
        t = torch.full((len(x),), step, device=x.device)
        predicted = process.predict(model(x, process.timesteps.to(x.device)[t], y), x, t)
        abar = float(process.alphas_cumprod_prev[step])
        variance = eta**2 * float(process.posterior_variance[step])
        x = abar**0.5 * predicted.x0 + max(1 - abar - variance, 0.0) ** 0.5 * predicted.eps
        if variance > 0:
            x = x + variance**0.5 * noise(step)
        yield State(step, x, predicted.x0)
