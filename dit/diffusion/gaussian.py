"""Gaussian diffusion in discrete time (DDPM: Ho et al., arXiv 2006.11239), with learned variance (IDDPM: Nichol &
Dhariwal, arXiv 2102.09672).

Forward. The steps of `dit.diffusion.schedule` compose to q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I), so
    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,  eps ~ N(0, I)                                  (DDPM, 4)
Posterior. By Bayes' rule the step back is Gaussian too, if x_0 is known (DDPM, 6 and 7):
    mean      sqrt(abar_{t-1}) beta_t / (1 - abar_t) x_0 + sqrt(1 - beta_t) (1 - abar_{t-1}) / (1 - abar_t) x_t
    variance  btilde_t = beta_t (1 - abar_{t-1}) / (1 - abar_t)
Reverse. The network predicts eps. Solved for x_0, equation 4 gives the expected data, which the posterior mean
takes for x_0. The best variance lies between btilde_t (right if the data is a point) and beta_t (right if it is
N(0, I)). The network's second output v interpolates: log var = (v+1)/2 log beta_t + (1-v)/2 log btilde_t (IDDPM, 15)
Loss. |eps - predicted eps|^2 trains the mean. The variational bound (`dit.diffusion.losses`) trains v alone, since
its mean is held constant (IDDPM, 16). t counts from 0, and abar before the first step is 1.
"""

# B = batch, C = channels, H, W = height and width, T = steps of this process
# x0 = data, x_t = noisy data, t = index into this process's steps, eps = noise, alphas_cumprod = abar

from dataclasses import dataclass, fields
from typing import NamedTuple, Self

import torch
from torch import Tensor

from dit.diffusion.config import DiffusionConfig
from dit.diffusion.losses import discretised_gaussian_log_likelihood, mean_bits, normal_kl
from dit.diffusion.process import Denoiser
from dit.diffusion.respace import kept_timesteps, respaced_betas
from dit.diffusion.schedule import betas as schedule_betas
from storage.errors import InputError


class Prediction(NamedTuple):
    """The distribution of x_{t-1} that a network's output stands for; each (B, C, H, W)."""

    mean: Tensor
    log_variance: Tensor
    x0: Tensor
    eps: Tensor


@dataclass(frozen=True, eq=False)
class GaussianDiffusion:
    """Tables (T,) of the process, in float64, and the formulas that read them.

    Every ``t`` here is an index (B,) into these T steps. The network is given ``timesteps[t]``,
    the timestep of the full process; the two differ once the process is respaced.
    Results have the dtype of the data that they are computed from.
    """

    timesteps: Tensor
    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    posterior_variance: Tensor
    posterior_log_variance: Tensor
    """Its first entry, which would be minus infinity, is a copy of the second."""
    posterior_mean_x0: Tensor
    """Weight of x0 in the posterior mean."""
    posterior_mean_xt: Tensor
    """Weight of x_t in the posterior mean."""

    @classmethod
    def from_config(cls, config: DiffusionConfig) -> Self:
        """The full process."""
        return cls.from_betas(schedule_betas(config), torch.arange(config.steps))

    @classmethod
    def from_betas(cls, betas: Tensor, timesteps: Tensor) -> Self:
        """The process with noise variances (T,) whose steps the network knows as ``timesteps`` (T,)."""
        betas = betas.double()
        alphas = 1 - betas
        cumprod = alphas.cumprod(0)
        previous = torch.cat([cumprod.new_ones(1), cumprod[:-1]])
        variance = betas * (1 - previous) / (1 - cumprod)
        return cls(
            timesteps=timesteps,
            betas=betas,
            alphas_cumprod=cumprod,
            alphas_cumprod_prev=previous,
            posterior_variance=variance,
            posterior_log_variance=torch.cat([variance[1:2], variance[1:]]).log(),
            posterior_mean_x0=betas * previous.sqrt() / (1 - cumprod),
            posterior_mean_xt=(1 - previous) * alphas.sqrt() / (1 - cumprod),
        )

    def __len__(self) -> int:
        """T, the number of steps."""
        return len(self.betas)

    def respaced(self, spacing: int | str) -> Self:
        """This process with fewer steps, such as 250 or "ddim50" (see `kept_timesteps`).

        Raises:
            InputError: no such number of steps fits.
        """
        kept = torch.tensor(kept_timesteps(len(self), spacing), device=self.betas.device)
        return self.from_betas(respaced_betas(self.alphas_cumprod, kept), self.timesteps[kept])

    def to(self, device: torch.device | str) -> Self:
        """The same tables on a device, bit for bit."""
        return type(self)(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def sample_t(self, u: Tensor) -> Tensor:
        """Indices (B,), each as likely as the others, from uniform numbers (B,) in [0, 1)."""
        return (u.double() * len(self)).long()

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Noisy data (B, C, H, W) after steps t (B,) (DDPM, equation 4)."""
        abar = self.alphas_cumprod
        return _at(abar.sqrt(), t, x0) * x0 + _at((1 - abar).sqrt(), t, x0) * noise

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, C, H, W) and clipped log-variance (B, 1, 1, 1) of x_{t-1} (DDPM, equations 6 and 7)."""
        mean = _at(self.posterior_mean_x0, t, x_t) * x0 + _at(self.posterior_mean_xt, t, x_t) * x_t
        return mean, _at(self.posterior_log_variance, t, x_t)

    def predict_x0(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The data in noisy data whose noise is known: `q_sample` solved for x0."""
        abar = self.alphas_cumprod
        return _at(abar.rsqrt(), t, x_t) * x_t - _at((1 / abar - 1).sqrt(), t, x_t) * eps

    def log_variance(self, v: Tensor, t: Tensor) -> Tensor:
        """Log-variance from the posterior's at v = -1 to that of beta at v = 1 (IDDPM, equation 15)."""
        share = (v + 1) / 2
        return share * _at(self.betas.log(), t, v) + (1 - share) * _at(self.posterior_log_variance, t, v)

    def predict(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """The distribution of x_{t-1} according to a network's output.

        Args:
            output: noise (B, C, H, W), or noise and variance interpolation (B, 2C, H, W); without
                the latter the variance is the posterior's.
            x_t: noisy data (B, C, H, W).
            t: indices (B,).

        Raises:
            InputError: the output has another number of channels.
        """
        eps, v = _split(output.to(x_t.dtype), x_t.shape[1])
        x0 = self.predict_x0(x_t, t, eps)
        mean, log_variance = self.q_posterior(x0, x_t, t)
        return Prediction(mean, log_variance if v is None else self.log_variance(v, t), x0, eps)

    def training_loss(self, output: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Loss of each sample, (B,), from a network's output at ``q_sample(x0, t, noise)``.

        "mse" is the squared error of the noise. "vlb", if the variance is learned, is the term of
        the variational bound at t in bits per element, in which the noise is held constant. Their
        sum is "loss" (IDDPM, equation 16, with lambda 0.001 for the sum over 1000 terms).

        Raises:
            InputError: the output has neither C nor 2C channels.
        """
        eps, v = _split(output.to(x0.dtype), x0.shape[1])
        mse = ((noise - eps) ** 2).flatten(1).mean(1)
        if v is None:
            return {"loss": mse, "mse": mse}
        vlb = self._vlb(torch.cat([eps.detach(), v], dim=1), x0, self.q_sample(x0, t, noise), t)
        return {"loss": mse + vlb, "mse": mse, "vlb": vlb}

    def training_terms(
        self, model: Denoiser, x0: Tensor, noise: Tensor, t: Tensor, y: Tensor | None
    ) -> dict[str, Tensor]:
        """`training_loss` of the model's output for the noisy data (see `Process`)."""
        output = model(self.q_sample(x0, t, noise), self.timesteps.to(t.device)[t], y)
        return self.training_loss(output, x0, noise, t)

    def _vlb(self, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """L_0 where t = 0, else L_{t-1}, in bits per element (DDPM, equation 5)."""
        predicted = self.predict(output, x_t, t)
        mean, log_variance = self.q_posterior(x0, x_t, t)
        kl = mean_bits(normal_kl(mean, log_variance, predicted.mean, predicted.log_variance))
        nll = -mean_bits(discretised_gaussian_log_likelihood(x0, predicted.mean, predicted.log_variance))
        return torch.where(t == 0, nll, kl)


def _at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Entries (B, 1, 1, 1) of a table (T,), on the device and in the dtype of ``like``."""
    entries = table.to(t.device)[t].to(like)
    return entries.reshape(-1, *[1] * (like.ndim - 1))


def _split(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    if output.shape[1] == channels:
        return output, None
    if output.shape[1] == 2 * channels:
        return output[:, :channels], output[:, channels:]
    raise InputError(f"model output: has {output.shape[1]} channels; the data needs {channels} or {2 * channels}")
