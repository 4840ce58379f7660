"""Flows from noise to data (SiT: Ma et al., arXiv 2401.08740). Time t is 0 at the noise and 1 at the data.

A path mixes data x0 and noise eps ~ N(0, I) (equation 1):

    x_t = alpha_t x0 + sigma_t eps         alpha_0 = sigma_1 = 0, alpha_1 = sigma_0 = 1 (for VP alpha_0 is 0.007)
    linear   alpha = t                                              sigma = 1 - t
    GVP      alpha = sin(pi t / 2)                                  sigma = cos(pi t / 2)
    VP       alpha = exp(-(1 - t)^2 (20 - 0.1) / 4 - (1 - t) 0.1 / 2)    sigma = sqrt(1 - alpha^2)

Its velocity is v = alpha' x0 + sigma' eps. A network that minimises E |v_network - v|^2 is the velocity of the
ordinary differential equation dx = v dt, which takes noise to data through the same distributions.

x_t and v are linear in x0 and eps. So any two of velocity, noise and data follow from the third and x_t:

    x0 = (sigma' x_t - sigma v) / (alpha sigma' - alpha' sigma)
    eps = (alpha v - alpha' x_t) / (alpha sigma' - alpha' sigma)          score = grad log p_t(x_t) = -eps / sigma

The divisor is -1 for the linear path and -pi / 2 for GVP. (A common form of the score divides numerator and divisor by
alpha', which is 0 at the data for GVP.) A network that predicts noise knows the data only after a division by alpha,
and one that predicts data the noise only after one by sigma: such a network is not evaluated where that is 0. Nor is
any network at t = 1 of VP, where sigma' is infinite.
"""

# B = batch, C = channels, H, W = height and width, t = time, from 0 at the noise to 1 at the data

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from dit.diffusion.config import FlowConfig
from dit.diffusion.process import Denoiser, per_sample

CUT = 1e-3
"""Distance of the first or last time from an end at which the network cannot be evaluated."""
VP_CUT = 1e-5
"""The same for VP in training, as in SiT."""
SHORT = 0.1
"""Predictions shorter than this share of the target have a smaller cosine, whose gradient is finite also at 0."""


class FlowPrediction(NamedTuple):
    """What a network's output stands for; each (B, C, H, W)."""

    velocity: Tensor
    noise: Tensor
    x0: Tensor


class Path(NamedTuple):
    """Weights of data and noise at times (B,), and their derivatives; all in float64."""

    alpha: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    alpha_prime: Callable[[Tensor], Tensor]
    sigma_prime: Callable[[Tensor], Tensor]


def _vp_log_alpha(t: Tensor) -> Tensor:
    return -((1 - t) ** 2) * (20 - 0.1) / 4 - (1 - t) * 0.1 / 2


def _vp_alpha_prime(t: Tensor) -> Tensor:
    return _vp_log_alpha(t).exp() * ((1 - t) * (20 - 0.1) / 2 + 0.1 / 2)


def _vp_sigma(t: Tensor) -> Tensor:
    return (-torch.expm1(2 * _vp_log_alpha(t))).sqrt()


PATHS = {
    "linear": Path(lambda t: t, lambda t: 1 - t, torch.ones_like, lambda t: -torch.ones_like(t)),
    "gvp": Path(
        lambda t: torch.sin(math.pi / 2 * t),
        lambda t: torch.cos(math.pi / 2 * t),
        lambda t: math.pi / 2 * torch.cos(math.pi / 2 * t),
        lambda t: -math.pi / 2 * torch.sin(math.pi / 2 * t),
    ),
    "vp": Path(
        lambda t: _vp_log_alpha(t).exp(),
        _vp_sigma,
        _vp_alpha_prime,
        lambda t: -_vp_log_alpha(t).exp() * _vp_alpha_prime(t) / _vp_sigma(t),
    ),
}
"""By the name in the config."""


@dataclass(frozen=True)
class Flow:
    """Path, times and loss of a flow. The network is given its time, unscaled."""

    config: FlowConfig

    @classmethod
    def from_config(cls, config: FlowConfig) -> Self:
        """The process of a config."""
        return cls(config)

    @property
    def bounds(self) -> tuple[float, float]:
        """First and last time at which the network may be evaluated."""
        path, predict = self.config.path, self.config.predict
        first = CUT if predict == "noise" and path != "vp" else 0.0
        return first, 1 - CUT if predict == "data" or path == "vp" else 1.0

    def alpha(self, t: Tensor) -> Tensor:
        """Weight of the data at times (B,), in float64."""
        return PATHS[self.config.path].alpha(t.double())

    def sigma(self, t: Tensor) -> Tensor:
        """Weight of the noise at times (B,), in float64."""
        return PATHS[self.config.path].sigma(t.double())

    def alpha_prime(self, t: Tensor) -> Tensor:
        """Derivative of `alpha` by the time."""
        return PATHS[self.config.path].alpha_prime(t.double())

    def sigma_prime(self, t: Tensor) -> Tensor:
        """Derivative of `sigma` by the time; for VP minus infinity at t = 1."""
        return PATHS[self.config.path].sigma_prime(t.double())

    def sample_t(self, u: Tensor) -> Tensor:
        """Times (B,) in float64 from uniform numbers (B,) in [0, 1), scaled into the times that are trained."""
        t = u.double()
        if self.config.times == "logit_normal":
            t = torch.sigmoid(self.config.logit_mean + self.config.logit_std * torch.special.ndtri(t))
        first, last = self.bounds
        if self.config.path == "vp":
            last = 1 - VP_CUT
        return first + (last - first) * t

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Noisy data (B, C, H, W) at times (B,) (equation 1)."""
        return per_sample(self.alpha(t), x0) * x0 + per_sample(self.sigma(t), x0) * noise

    def predict(self, model: Denoiser, x: Tensor, t: Tensor, y: Tensor | None) -> FlowPrediction:
        """Velocity, noise and data according to a network.

        Args:
            model: the network, possibly guided. Outputs beyond the first C channels are not used.
            x: noisy data (B, C, H, W).
            t: its times (B,) in float64, within the `bounds`.
            y: labels (B,), or None.

        Returns:
            Each (B, C, H, W) in the dtype of x.
        """
        output = self._output(model, x, t, y)
        alpha, sigma, alpha_prime, sigma_prime = (
            per_sample(weight(t), x) for weight in (self.alpha, self.sigma, self.alpha_prime, self.sigma_prime)
        )
        if self.config.predict == "velocity":
            divisor = alpha * sigma_prime - alpha_prime * sigma
            noise = (alpha * output - alpha_prime * x) / divisor
            return FlowPrediction(output, noise, (sigma_prime * x - sigma * output) / divisor)
        if self.config.predict == "noise":
            noise, x0 = output, (x - sigma * output) / alpha
        else:
            noise, x0 = (x - alpha * output) / sigma, output
        return FlowPrediction(alpha_prime * x0 + sigma_prime * noise, noise, x0)

    def score(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Score (B, C, H, W), grad log p_t(x), of a velocity at x (B, C, H, W) and times (B,) below 1."""
        alpha, alpha_prime = self.alpha(t), self.alpha_prime(t)
        divisor = self.sigma(t) * (alpha_prime * self.sigma(t) - alpha * self.sigma_prime(t))
        return per_sample(alpha / divisor, x) * velocity - per_sample(alpha_prime / divisor, x) * x

    def training_terms(
        self, model: Denoiser, x0: Tensor, noise: Tensor, t: Tensor, y: Tensor | None
    ) -> dict[str, Tensor]:
        """See `Process`. "mse" is the squared error of what the network predicts: velocity, noise or data.

        "cosine", if it has a weight, is 1 minus the cosine of the angle between prediction and target along the
        channels, in the mean over the positions. "loss" is "mse" plus weight times "cosine".
        """
        found = self._output(model, self.q_sample(x0, t, noise), t, y)
        target = self._target(x0, noise, t)
        mse = ((found - target) ** 2).flatten(1).mean(1)
        if not self.config.cosine:
            return {"loss": mse, "mse": mse}
        cosine = (1 - _cosine(found, target)).flatten(1).mean(1)
        return {"loss": mse + self.config.cosine * cosine, "mse": mse, "cosine": cosine}

    def _output(self, model: Denoiser, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return model(x, t.to(x.dtype), y)[:, : x.shape[1]].to(x.dtype)

    def _target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if self.config.predict == "velocity":
            return per_sample(self.alpha_prime(t), x0) * x0 + per_sample(self.sigma_prime(t), x0) * noise
        return noise if self.config.predict == "noise" else x0


def _cosine(found: Tensor, target: Tensor) -> Tensor:
    """Cosine of the angle between vectors (B, C, H, W) along the channels, (B, H, W); less where one is short."""
    length = torch.linalg.vector_norm(target, dim=1)
    lengths: Tensor = length * torch.linalg.vector_norm(found, dim=1).maximum(SHORT * length)
    return (found * target).sum(1) / lengths.clamp(min=1e-12)
