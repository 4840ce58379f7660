"""Terms of the variational bound, in nats."""

import math

import torch
from torch import Tensor

HALF_BIN = 1 / 255
LAST_BIN = 0.999
SMALLEST = 1e-12


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))) of each element. Shapes broadcast."""
    gap = (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    return 0.5 * (log_variance2 - log_variance1 + torch.exp(log_variance1 - log_variance2) + gap - 1)


def discretised_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log-probability of each element's bin of width 2/255 under a Gaussian (arXiv 2006.11239, equation 13).

    The bins centred at -1 and 1 reach to infinity. Used on latents too, as DiT does, where values
    beyond one fall into those two bins.
    """
    inverse_std, gap = torch.exp(-0.5 * log_variance), x - mean
    ndtr = torch.special.ndtr
    # A bin above the mean is read as its mirror image below, where small probabilities keep their digits.
    inside = ndtr((HALF_BIN - gap.abs()) * inverse_std) - ndtr((-HALF_BIN - gap.abs()) * inverse_std)
    lowest, highest = ndtr((HALF_BIN + gap) * inverse_std), ndtr((HALF_BIN - gap) * inverse_std)
    probability = torch.where(x < -LAST_BIN, lowest, torch.where(x > LAST_BIN, highest, inside))
    return probability.clamp(min=SMALLEST).log()


def mean_bits(nats: Tensor) -> Tensor:
    """Mean over all but the first dimension, (B, ...) to (B,), in bits."""
    return nats.flatten(1).mean(1) / math.log(2)
