"""Noise schedules: the variance beta_t of the noise that step t adds.

Step t shrinks the data and adds noise, such that data of unit variance keeps unit variance (DDPM: Ho et al.,
arXiv 2006.11239, equation 2):

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)

After step t the factors have multiplied to abar_t = (1 - beta_0) ... (1 - beta_t), the share of the data in the
variance of x_t. Sampling starts from pure noise, so abar must end near 0. DDPM's schedule, linear from 1e-4 to
0.02 in T = 1000 steps, ends at 4e-5.
"""

import torch
from torch import Tensor

from dit.diffusion.config import DiffusionConfig


def betas(config: DiffusionConfig) -> Tensor:
    """Noise variance of each step, float64 (steps,)."""
    return SCHEDULES[config.schedule](config)


def _linear(config: DiffusionConfig) -> Tensor:
    return torch.linspace(config.beta_start, config.beta_end, config.steps, dtype=torch.float64)


SCHEDULES = {"linear": _linear}
"""By the name in the config."""
