"""Terms of the variational bound on -log p(x_0), in nats per element (Ho et al., arXiv 2006.11239, equation 5).

    L = L_T + L_{T-1} + ... + L_0
    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))    both Gaussian, so in closed form:
    KL(N(m1, s1^2) || N(m2, s2^2)) = (log s2^2 - log s1^2 + (s1^2 + (m1 - m2)^2) / s2^2 - 1) / 2
    L_0 = -log p(x_0 | x_1)

L_T has nothing to learn. In L_0 the data is one of 256 levels, mapped to -1 .. 1 with a distance of 2/255, so its
probability is that of a bin: Phi((x + 1/255 - m) / s) - Phi((x - 1/255 - m) / s) (equation 13), with Phi the
normal distribution function. Nats divided by ln 2 are bits.
"""

# B = batch

import math

import torch
from torch import Tensor

HALF_BIN = 1 / 255
LAST_BIN = 0.999
"""Numbers beyond belong to the outermost bins."""
MIN_PROBABILITY = 1e-12


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
    # Phi(b) - Phi(a) loses its digits far above the mean, so each bin is mirrored to below the mean.
    inside = ndtr((HALF_BIN - gap.abs()) * inverse_std) - ndtr((-HALF_BIN - gap.abs()) * inverse_std)
    lowest, highest = ndtr((HALF_BIN + gap) * inverse_std), ndtr((HALF_BIN - gap) * inverse_std)
    probability = torch.where(x < -LAST_BIN, lowest, torch.where(x > LAST_BIN, highest, inside))
    return probability.clamp(min=MIN_PROBABILITY).log()


def mean_bits(nats: Tensor) -> Tensor:
    """Mean over all but the first dimension, (B, ...) to (B,), in bits."""
    return nats.flatten(1).mean(1) / math.log(2)
