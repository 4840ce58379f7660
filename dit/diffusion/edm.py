"""Diffusion over continuous noise levels (Karras et al., "Elucidating the Design Space", arXiv 2206.00364, EDM)."""

# B = batch, C = channels, H, W = height and width, sigma = standard deviation of the noise

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from dit.diffusion.config import EDMConfig
from dit.diffusion.process import Denoiser

SMALLEST_U = 2.0**-54


@dataclass(frozen=True)
class EDM:
    """Preconditioning, noise levels and loss of EDM (table 1, last column).

    Its times are noise levels sigma. The network is given ln(sigma) / 4 and data of unit variance,
    and its output, called F, is mixed with the noisy data to expected data.
    """

    p_mean: float
    p_std: float
    sigma_data: float

    @classmethod
    def from_config(cls, config: EDMConfig) -> Self:
        """The process of a config."""
        return cls(config.p_mean, config.p_std, config.sigma_data)

    @staticmethod
    def network_time(sigma: float) -> float:
        """What the network is given for a noise level: ln(sigma) / 4; minus infinity for none."""
        return math.log(sigma) / 4 if sigma > 0 else -math.inf

    def sample_t(self, u: Tensor) -> Tensor:
        """Noise levels (B,) in float64 from uniform numbers (B,) in [0, 1): ln(sigma) is N(p_mean, p_std^2)."""
        normal = torch.special.ndtri(u.double().clamp(min=SMALLEST_U))
        return torch.exp(self.p_mean + self.p_std * normal)

    def q_sample(self, x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """Noisy data (B, C, H, W) at noise levels (B,)."""
        return x0 + _at(sigma, x0) * noise

    def denoise(self, model: Denoiser, x: Tensor, sigma: Tensor, y: Tensor | None) -> Tensor:
        """Data expected behind noisy data (equation 7).

        Args:
            model: the network F, possibly guided.
            x: noisy data (B, C, H, W).
            sigma: its noise levels (B,), above 0.
            y: labels (B,), or None.

        Returns:
            (B, C, H, W) in the dtype of x.
        """
        s, data = sigma.double(), self.sigma_data
        spread = (s**2 + data**2).sqrt()
        output = model(_at(1 / spread, x) * x, (s.log() / 4).to(x.dtype), y).to(x.dtype)
        return _at(data**2 / spread**2, x) * x + _at(s * data / spread, x) * output

    def training_terms(
        self, model: Denoiser, x0: Tensor, noise: Tensor, t: Tensor, y: Tensor | None
    ) -> dict[str, Tensor]:
        """See `Process`. "mse" is the squared error of the data; "loss" is that times the level's weight (equation 8).

        With the weight, (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, the loss of an untrained
        network, whose F is 0, is expected to be 1 at every level.
        """
        expected = self.denoise(model, self.q_sample(x0, t, noise), t, y)
        mse = ((expected - x0) ** 2).flatten(1).mean(1)
        s = t.double()
        weight = (s**2 + self.sigma_data**2) / (s * self.sigma_data) ** 2
        return {"loss": weight.to(mse.dtype) * mse, "mse": mse}


def _at(factor: Tensor, like: Tensor) -> Tensor:
    """Factors (B,) as (B, 1, 1, 1), on the device and in the dtype of ``like``."""
    return factor.to(like).reshape(-1, *[1] * (like.ndim - 1))
