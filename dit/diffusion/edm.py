"""Diffusion over continuous noise levels (EDM: Karras et al., arXiv 2206.00364).

Noise is added to unscaled data: x = x0 + sigma eps. A denoiser D(x; sigma) that minimises E |D - x0|^2 is all
that sampling needs, since it gives the score: grad log p(x; sigma) = (D(x; sigma) - x) / sigma^2 (equation 3).

The scale of x and of the noise in it varies by orders of magnitude, so D wraps a network F (equation 7):

    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)
    c_in = 1 / sqrt(sigma^2 + sigma_data^2)                         F's input has unit variance
    c_skip = sigma_data^2 / (sigma^2 + sigma_data^2)                the choice with the smallest c_out,
    c_out = sigma sigma_data / sqrt(sigma^2 + sigma_data^2)         so D amplifies errors of F least
    c_noise = ln(sigma) / 4                                         (table 1; derived in appendix B.6)

F's target (x0 - c_skip x) / c_out then has unit variance too. The loss (equation 8) weights |D - x0|^2 by 1 / c_out^2,
which makes it |F - target|^2: equal at all levels for an untrained F. In training ln(sigma) is N(p_mean, p_std^2).
"""

# B = batch, C = channels, H, W = height and width, sigma = standard deviation of the noise

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from dit.diffusion.config import EDMConfig
from dit.diffusion.process import Denoiser, per_sample

SMALLEST_U = 2.0**-54
"""Replaces a uniform 0, whose normal quantile would be minus infinity."""


@dataclass(frozen=True)
class EDM:
    """Preconditioning, noise levels and loss of EDM (table 1, last column). Its times are noise levels sigma."""

    p_mean: float
    p_std: float
    sigma_data: float

    @classmethod
    def from_config(cls, config: EDMConfig) -> Self:
        """The process of a config."""
        return cls(config.p_mean, config.p_std, config.sigma_data)

    @staticmethod
    def network_time(sigma: float) -> float:
        """c_noise of a noise level: ln(sigma) / 4; minus infinity for sigma = 0."""
        return math.log(sigma) / 4 if sigma > 0 else -math.inf

    def sample_t(self, u: Tensor) -> Tensor:
        """Noise levels (B,) in float64 from uniform numbers (B,) in [0, 1): ln(sigma) is N(p_mean, p_std^2)."""
        normal = torch.special.ndtri(u.double().clamp(min=SMALLEST_U))
        return torch.exp(self.p_mean + self.p_std * normal)

    def q_sample(self, x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """Noisy data (B, C, H, W) at noise levels (B,)."""
        return x0 + per_sample(sigma, x0) * noise

    def denoise(self, model: Denoiser, x: Tensor, sigma: Tensor, y: Tensor | None) -> Tensor:
        """The expected data D(x; sigma) of noisy data (equation 7).

        Args:
            model: the network F, possibly guided.
            x: noisy data (B, C, H, W).
            sigma: its noise levels (B,), above 0.
            y: labels (B,), or None.

        Returns:
            (B, C, H, W) in the dtype of x.
        """
        s, data = sigma.double(), self.sigma_data
        total = (s**2 + data**2).sqrt()  # standard deviation of x
        c_in, c_noise, c_skip, c_out = 1 / total, s.log() / 4, data**2 / total**2, s * data / total
        output = model(per_sample(c_in, x) * x, c_noise.to(x.dtype), y).to(x.dtype)
        return per_sample(c_skip, x) * x + per_sample(c_out, x) * output

    def training_terms(
        self, model: Denoiser, x0: Tensor, noise: Tensor, t: Tensor, y: Tensor | None
    ) -> dict[str, Tensor]:
        """See `Process`. "mse" is |D - x0|^2; "loss" is that times the weight of the level, 1 / c_out^2 (equation 8).

        The loss of an untrained network, whose F is 0, is 1 at every level, if the data has variance sigma_data^2.
        """
        expected = self.denoise(model, self.q_sample(x0, t, noise), t, y)
        mse = ((expected - x0) ** 2).flatten(1).mean(1)
        s = t.double()
        weight = (s**2 + self.sigma_data**2) / (s * self.sigma_data) ** 2
        return {"loss": weight.to(mse.dtype) * mse, "mse": mse}
